"""How a matrix lies in a safetensors folder: one module per storage format, one row each in table.py.

Readers (checkpoints/) and writers (folder/) both stand on this folder, which knows neither of them.
"""
