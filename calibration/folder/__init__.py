"""Quantize one layer of a folder (INT4, NVFP4, MXFP4) from its weights and the calibration text."""
