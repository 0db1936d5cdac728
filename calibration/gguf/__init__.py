"""Quantize one layer of a GGUF file from its weights and the calibration text."""
