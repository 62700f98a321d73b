"""Memory: measured exactly (`meter.py`), and kept low by moving blocks to the host or to disk (`offload.py`)."""
