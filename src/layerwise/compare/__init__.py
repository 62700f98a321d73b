"""`layerwise compare`: a folder of ordinary runs, rules by seeds.

The options and the seeds decide which runs there should be. Missing runs go to worker processes. A worker imports torch
once and trains many runs. Draws depend only on (seed, step, block), so it does not matter which worker trains which
run. All state is in files: `result.json` marks a finished run and is written last, so that SIGKILL at any moment loses
only the runs in progress. Workers exit when their standard input ends, so none outlives its parent. They also hold the
folder's lock, which keeps a second comparison out until then.

Files:

    grid.py          rules by seeds
    settings.py      its settings, without torch
    rules_asked.py   `--rule sll:overlap=1`
    grid_runs.py     the runs of a grid, each in its folder
    pool.py          worker processes
    worker.py        one of them
    tuning.py        trials of learning rate and weight decay
    peak.py          every rule within the same memory
    depth.py         memory in deeper networks
    record.py        the files of a comparison
"""
