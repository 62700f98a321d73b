"""A run: its options, its folder, its checkpoints, on one process or several."""
