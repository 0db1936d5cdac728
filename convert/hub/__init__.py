"""Hugging Face and ModelScope: listing, fetching, publishing."""
