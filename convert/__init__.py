"""Read and write files: checkpoints, hubs, and every storage format."""
