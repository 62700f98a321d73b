"""A run: its options, its folder, its checkpoints, on one process or several.

Files:

    options and folder
        options.py                  the options of a run: command line, recipe and record
        settings.py                 those that need no torch
        arguments.py                from the words of the command line
        folders.py                  locks, creates and reads the folder
        layout.py                   names of its files
        writing.py                  replaces a file in one step
        output.py                   files that a user names
        recipes/                    options by name
    training
        building.py                 device, data, model and learner from options
        training.py                 `Run`: epochs, evaluation, logs, checkpoints, result
        checkpoint.py               saves and reads checkpoints
        evaluation.py               metrics over a split
        fitting.py                  the number of parts for `--peak`
        log.py                      `metrics.jsonl` and TensorBoard
        progress.py                 the bar on the terminal
        interrupt.py                Ctrl-C and SIGTERM
        environment.py              the machine and the versions
    several ranks
        launch.py                   their options
        distributed.py              their common base
        agreement.py                what all must have in common
        pipelined.py                `--parallel pipeline`
        replicated.py               `--parallel data`
        sharded.py                  `--parallel sharded`
        distributed_checkpoint.py   a checkpoint in parts
    afterwards
        predicting.py               predictions of a trained run
        generating.py               text from a trained run
        exporting.py                the weights alone
"""
