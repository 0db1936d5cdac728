"""Recipes of `mmquant run`: what they may say, how they are read, and examples."""
