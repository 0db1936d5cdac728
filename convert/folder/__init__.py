"""Write safetensors folders: one module per format, the writer, the check."""
