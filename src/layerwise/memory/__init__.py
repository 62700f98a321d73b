"""Memory: measured exactly (`meter.py`), and kept low by moving blocks to the host or to disk (`offload.py`).

Files:

    meter.py         exact peak of a training step, by content
    watching.py      sees every operation, for the meters
    flops.py         floating-point operations
    fitting.py       the smallest number of parts that stays within a peak
    offload.py       blocks on the host or on disk until they are needed
    stores.py        the bytes of offloaded blocks
    blanks.py        placeholders of offloaded tensors
    activations.py   saved activations on the host or on disk
    mmap.py          tensors mapped from a file
    tensorfile.py    a safetensors file, written tensor by tensor
    malloc.py        freed memory stays in the process
"""
