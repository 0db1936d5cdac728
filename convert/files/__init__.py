"""Durable files: whole or absent, one process per folder."""
