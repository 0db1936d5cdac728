"""A checkpoint of MiniMax-M2.7's size that is never stored: served over the hub's protocol, made as it is read."""
