"""`layerwise bench scaling`: throughput of several processes, measured and simulated.

Files:

    bench.py      the command
    options.py    its options
    jobs.py       starts the processes
    rank.py       what each of them runs
    counting.py   its time and its bytes
    simulate.py   other machines, simulated
    series.py     rounds of one way
    tables.py     tables
"""
