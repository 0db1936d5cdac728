"""Statistics of every expert: collected, summed, stored, reported."""
