"""The command line: from words to calls, and from failures to one sentence.

A command is imported when it is called, because most of them import torch. Lists, help and answers to misspelt names
read the source files (`catalogue.py`), so they need no torch.
"""
