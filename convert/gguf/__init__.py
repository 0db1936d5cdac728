"""Read and write the GGUF file format."""
