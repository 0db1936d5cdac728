"""Measure perplexity, KL divergence and agreement, layer by layer."""
