"""Put one thread in each test process, so that two workers do not fight for cores.

Where there is no GPU, Triton kernels run in Triton's interpreter.
"""

from __future__ import annotations

import os

import torch
from hypothesis import settings

torch.set_num_threads(1)
# CI looks at the same examples every time; `--hypothesis-profile=default` looks for new ones.
settings.register_profile("fixed", derandomize=True)
settings.load_profile("fixed")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
