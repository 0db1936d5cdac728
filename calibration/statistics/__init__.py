"""Statistics of every expert: collect, sum, store, report."""
