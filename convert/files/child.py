"""Start Python child processes without modules of the current folder and without secrets."""

from __future__ import annotations

import os
from collections.abc import Mapping

# Python puts the current folder (-c, -m) or the script's folder first among the modules; -P leaves it out.
SAFE_PATH = "-P"
NAMES = frozenset(
    "PATH HOME USER LOGNAME USERPROFILE APPDATA LOCALAPPDATA SYSTEMROOT WINDIR COMSPEC PATHEXT TEMP TMP TMPDIR LANG TZ "
    "TERM LD_LIBRARY_PATH DYLD_LIBRARY_PATH VIRTUAL_ENV CONDA_PREFIX HTTP_PROXY HTTPS_PROXY ALL_PROXY NO_PROXY "
    "REQUESTS_CA_BUNDLE CURL_CA_BUNDLE HF_HOME HF_HUB_CACHE PYTHONDONTWRITEBYTECODE PYTHONUTF8".split()
)
PREFIXES = (
    *("LC_", "SSL_CERT_", "XDG_", "OMP_", "MKL_", "KMP_", "CUDA_", "NVIDIA_", "ROCR_", "HIP_", "TRITON_", "TORCH"),
    *("PYTORCH_", "HF_XET_"),
)


def environment(extra: Mapping[str, str]) -> dict[str, str]:
    """The environment of a child: what programs need to run (paths, proxies, devices), and `extra`. No tokens.

    PYTHONPATH goes along without its empty entries, which would mean the current folder.
    """
    kept = {k: v for k, v in os.environ.items() if k.upper() in NAMES or k.upper().startswith(PREFIXES)}
    if folders := [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if os.path.isabs(p)]:
        kept["PYTHONPATH"] = os.pathsep.join(folders)
    return kept | dict(extra)
