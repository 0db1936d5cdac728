"""The GGUF file format in both directions."""
