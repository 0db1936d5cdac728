"""Integer grids of all INT formats: round to nearest, GPTQ, AWQ, scale search and bit packing."""
