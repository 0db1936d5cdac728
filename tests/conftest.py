"""Put one thread in each test process, so that two workers do not fight for cores.

Where there is no GPU, Triton kernels run in Triton's interpreter.
"""

from __future__ import annotations

import os

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
# CI looks at the same examples every time; `--hypothesis-profile=default` looks for new ones.
# A busy machine is slow at making them, which says nothing of the code.
settings.register_profile("fixed", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fixed")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
