"""Perplexity, KL divergence and agreement, streamed layer by layer."""
