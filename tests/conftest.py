"""Tests import their shared helpers by name; one thread a process keeps two workers off each other's cores."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
