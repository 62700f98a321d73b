"""`layerwise compare`: a grid of runs."""
