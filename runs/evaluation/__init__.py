"""An evaluation: texts, engines, result, report."""
