"""Files: checkpoints and hubs, the names of MiniMax-M2, writers and readers of every format."""
