"""FP4 grids: E2M1 codes under block scales of a few bits, as NVFP4 and MXFP4 have them."""
