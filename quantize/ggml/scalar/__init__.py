"""The types with value = scale * level - minimum: K-quants, legacy types, IQ4 and MXFP4."""
