"""Affine groups (MLX): codes from 0 up under a scale and a bias, both bfloat16."""
