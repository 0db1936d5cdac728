"""MiniMax-M2.7 to FP8, INT4 and GGUF: commands here; quantize numbers, convert files, calibration activations."""

__version__ = "0.1.0"
