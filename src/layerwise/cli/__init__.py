"""The command line: from words to calls, and from failures to one sentence.

A command is imported when it is called, because most of them import torch. Lists, help and answers to misspelt names
read the source files (`catalogue.py`), so they need no torch.

Files:

    words to a call
        main.py         finds the command
        commands.py     the table of commands
        words.py        options that no other package declares
        options.py      options, read from the source of their dataclasses
        source.py       classes, read from source files
        catalogue.py    rules, models and data, read from source files
        early.py        misspelt names, before torch is imported
        flags.py        misspelt options, before torch is imported
        help.py         `--help`
        completion.py   `layerwise completion`
        signals.py      SIGTERM and Ctrl-C
    the commands
        train.py        `train`
        trained.py      `eval`, `beliefs`, `predict`, `export`
        compare.py      `compare`, `report`
        bench.py        `bench`
        validate.py     `validate`
        listing.py      `ls`, `describe`
        describing.py   a rule in words
        formulas.py     LaTeX as plain text
        doctor.py       `doctor`
        new_rule.py     `new-rule`
"""
