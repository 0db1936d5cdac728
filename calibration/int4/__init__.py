"""Quantize one layer of an INT4 folder from its weights and the calibration text."""
