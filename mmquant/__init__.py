"""mmquant: MiniMax-M2.7 to FP8, INT4 and GGUF. Commands here; numbers in quantize, files in convert, activations in calibration."""

__version__ = "0.1.0"
