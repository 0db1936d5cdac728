"""Quantize and convert MiniMax-M2.7 to FP8, INT4 and GGUF, checked against the reference."""

from pathlib import Path

__version__ = "0.1.0"

_CHECKOUT = Path(__file__).resolve().parent.parent
if (_CHECKOUT / "pyproject.toml").is_file() and (_CHECKOUT / "quantize").is_dir():
    __path__.append(str(_CHECKOUT))  # in a checkout the packages lie beside this folder, in a wheel inside it
