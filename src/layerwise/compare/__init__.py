"""`layerwise compare`: a folder of ordinary runs, rules by seeds.

Which runs there should be follows from the options and the seeds. Those that are missing go to worker processes. A
worker imports torch once and trains many runs; draws depend on (seed, step, block) only, so it does not matter which
worker trains which run. State is in files alone: `result.json` marks a finished run and is written last, so that
SIGKILL at any moment loses no more than the runs in progress. Workers end when their standard input does, so none
outlives its parent; they hold the folder's lock too, which keeps a second comparison out until then.
"""
