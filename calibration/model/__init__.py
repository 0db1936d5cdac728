"""The reference forward, and the residual stream between layers."""
