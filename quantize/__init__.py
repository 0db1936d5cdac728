"""Numbers: tensors in, tensors out. No files, no model, no hub."""
