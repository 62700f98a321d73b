"""Measurements of rules and runs.

Files:

    bench_memory.py    `layerwise bench memory`
    bench_speed.py     `layerwise bench speed`
    bench_problem.py   what both measure
    bench_options.py   their options, without torch
    energy.py          energy of the processor
    diagnostics.py     the layers of a trained network
    filters.py         the weights of the first layer as pictures
    beliefs.py         beliefs against SID's theory
    validate.py        what a rule declares, and the files of a run
"""
