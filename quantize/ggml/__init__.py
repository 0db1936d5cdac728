"""The block formats of ggml (GGUF types): bit layouts, encoders and decoders."""
