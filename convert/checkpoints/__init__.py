"""Read safetensors checkpoints: headers, tensors, quantized folders, the order of shards."""
