"""Numbers: how weights become codes and scales. Tensors in, tensors out; no files, no model, no hub."""
