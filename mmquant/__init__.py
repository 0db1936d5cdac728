"""Quantize and convert MiniMax-M2.7 to FP8, INT4, NVFP4, MXFP4 and GGUF, checked against the reference.

    import mmquant
    from mmquant import Int4Options

    mmquant.quantize_int4("demo", "m27-int4", Int4Options(group_size=32))

Every function does what the command of its name does, with the same options and defaults (docs/api.md). Names are
imported on use, so that `import mmquant` loads no torch.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmquant.errors import FitError, GateError, InputError, MmquantError, PartialError
from mmquant.monitor import Bar, Monitor

if TYPE_CHECKING:
    from mmquant.calibration.statistics.store import open_statistics
    from mmquant.convert.hub.store import FetchOptions
    from mmquant.runs.bf16 import dequantize_bf16
    from mmquant.runs.calibrate import Calibration, calibrate
    from mmquant.runs.doctor import Diagnosis, doctor
    from mmquant.runs.evaluation.plan import EvaluationPlan, plan_evaluation
    from mmquant.runs.evaluation.run import Evaluation, evaluate
    from mmquant.runs.fit import Fits, fit
    from mmquant.runs.fp4 import quantize_mxfp4, quantize_nvfp4
    from mmquant.runs.fp8 import quantize_fp8
    from mmquant.runs.gguf import quantize_gguf
    from mmquant.runs.inspect import Census, inspect
    from mmquant.runs.int4 import quantize_int4
    from mmquant.runs.mlx import quantize_mlx
    from mmquant.runs.models import open_any as open_model
    from mmquant.runs.options import (
        Bf16Options,
        CalibrateOptions,
        Fp8Options,
        GgufOptions,
        Int4Options,
        MlxOptions,
        Mxfp4Options,
        Nvfp4Options,
        PlanOptions,
    )
    from mmquant.runs.options_use import DoctorOptions, EvalOptions, FitOptions, PullOptions, PushOptions, VerifyOptions
    from mmquant.runs.plan import Planned, plan
    from mmquant.runs.pull import Pulled, pull
    from mmquant.runs.push import Pushed, push
    from mmquant.runs.report import Reported, report
    from mmquant.runs.results import Quantized
    from mmquant.runs.run import Made, run
    from mmquant.runs.status import Status, status
    from mmquant.runs.verify.run import Verified, verify

__version__ = "0.1.0"

_CHECKOUT = Path(__file__).resolve().parent.parent
if (_CHECKOUT / "pyproject.toml").is_file() and (_CHECKOUT / "quantize").is_dir():
    __path__.append(str(_CHECKOUT))  # in a checkout the packages lie beside this folder, in a wheel inside it

_OPTIONS = (
    "Bf16Options CalibrateOptions Fp8Options GgufOptions Int4Options MlxOptions Mxfp4Options Nvfp4Options PlanOptions"
)
_OPTIONS_USE = "DoctorOptions EvalOptions FitOptions PullOptions PushOptions VerifyOptions"
# Public name -> the module that has it, and its name there.
_PUBLIC = {
    "Calibration": ("runs.calibrate", "Calibration"),
    "Census": ("runs.inspect", "Census"),
    "Diagnosis": ("runs.doctor", "Diagnosis"),
    "Evaluation": ("runs.evaluation.run", "Evaluation"),
    "EvaluationPlan": ("runs.evaluation.plan", "EvaluationPlan"),
    "FetchOptions": ("convert.hub.store", "FetchOptions"),
    "Made": ("runs.run", "Made"),
    "Planned": ("runs.plan", "Planned"),
    "Pulled": ("runs.pull", "Pulled"),
    "Pushed": ("runs.push", "Pushed"),
    "Quantized": ("runs.results", "Quantized"),
    "calibrate": ("runs.calibrate", "calibrate"),
    "dequantize_bf16": ("runs.bf16", "dequantize_bf16"),
    "doctor": ("runs.doctor", "doctor"),
    "Fits": ("runs.fit", "Fits"),
    "fit": ("runs.fit", "fit"),
    "evaluate": ("runs.evaluation.run", "evaluate"),
    "inspect": ("runs.inspect", "inspect"),
    "open_model": ("runs.models", "open_any"),
    "open_statistics": ("calibration.statistics.store", "open_statistics"),
    "plan": ("runs.plan", "plan"),
    "plan_evaluation": ("runs.evaluation.plan", "plan_evaluation"),
    "pull": ("runs.pull", "pull"),
    "push": ("runs.push", "push"),
    "Status": ("runs.status", "Status"),
    "Verified": ("runs.verify.run", "Verified"),
    "verify": ("runs.verify.run", "verify"),
    "Reported": ("runs.report", "Reported"),
    "report": ("runs.report", "report"),
    "run": ("runs.run", "run"),
    "status": ("runs.status", "status"),
    "quantize_fp8": ("runs.fp8", "quantize_fp8"),
    "quantize_gguf": ("runs.gguf", "quantize_gguf"),
    "quantize_int4": ("runs.int4", "quantize_int4"),
    "quantize_mlx": ("runs.mlx", "quantize_mlx"),
    "quantize_mxfp4": ("runs.fp4", "quantize_mxfp4"),
    "quantize_nvfp4": ("runs.fp4", "quantize_nvfp4"),
    **{name: ("runs.options", name) for name in _OPTIONS.split()},
    **{name: ("runs.options_use", name) for name in _OPTIONS_USE.split()},
}

__all__ = [
    "Bar",
    "Bf16Options",
    "CalibrateOptions",
    "Calibration",
    "Census",
    "Diagnosis",
    "DoctorOptions",
    "EvalOptions",
    "Evaluation",
    "EvaluationPlan",
    "FetchOptions",
    "FitError",
    "FitOptions",
    "Fits",
    "Fp8Options",
    "GateError",
    "GgufOptions",
    "InputError",
    "Int4Options",
    "Made",
    "MlxOptions",
    "MmquantError",
    "Monitor",
    "Mxfp4Options",
    "Nvfp4Options",
    "PartialError",
    "PlanOptions",
    "Planned",
    "PullOptions",
    "Pulled",
    "PushOptions",
    "Pushed",
    "Quantized",
    "Reported",
    "Status",
    "Verified",
    "VerifyOptions",
    "__version__",
    "calibrate",
    "dequantize_bf16",
    "doctor",
    "evaluate",
    "fit",
    "inspect",
    "open_model",
    "open_statistics",
    "plan",
    "plan_evaluation",
    "pull",
    "push",
    "quantize_fp8",
    "quantize_gguf",
    "quantize_int4",
    "quantize_mlx",
    "quantize_mxfp4",
    "quantize_nvfp4",
    "report",
    "run",
    "status",
    "verify",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - any public name
    if name not in _PUBLIC:
        raise AttributeError(f"module 'mmquant' has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    value = getattr(importlib.import_module(f"mmquant.{module}"), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
