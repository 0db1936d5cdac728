"""Evaluate artifacts: texts, engines, result, report."""
