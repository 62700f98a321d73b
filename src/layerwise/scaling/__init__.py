"""`layerwise bench scaling`: throughput of several processes, measured and simulated."""
