"""Hugging Face and ModelScope: list, fetch, publish."""
