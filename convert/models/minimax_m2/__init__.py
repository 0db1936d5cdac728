"""MiniMax-M2: everything that is said of this architecture alone. Its row in the table is `ARCHITECTURE` in row.py."""

from .geometry import Geometry

__all__ = ["Geometry"]
