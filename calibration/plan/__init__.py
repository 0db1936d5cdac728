"""Which type each matrix of a file should have: its sensitivity is measured, the choice is solved exactly."""
