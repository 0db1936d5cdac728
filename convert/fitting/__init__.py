"""What fits where: geometry -> sizes -> placement -> verdict -> commands, each a module of plain functions."""
