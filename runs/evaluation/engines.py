"""Evaluate with a real engine beside the streamed pass: llama.cpp on GGUF files, vLLM on folders.

llama.cpp gives whole logits through its C API (llamacpp.py); where the reference is a GGUF file too, its logits
come from llama.cpp as well, and the numbers are those of llama-perplexity. vLLM gives the log-probabilities of a
prompt's tokens: the most probable ones, the rest as one mass. Otherwise the reference is the streamed one, as stored.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from mmquant.errors import InputError

from ...calibration.evaluate.metrics import Scores, compare, join_metrics, summarise
from ...calibration.evaluate.reference_store import StoredReference, compare_stored
from ...calibration.text.sample import Sample
from ...convert.gguf.reader import find_parts
from .stdout import stdout_to_stderr
from .vllm_engine import EngineScores, devices_for, vllm_arguments, vllm_scores

COMPARED = ("ppl", "ppl_ratio", "top1")
# Caches by the word of --cache: what vLLM calls them, and ggml's number of the type.
VLLM_CACHES = {"16bit": "bfloat16", "fp8": "fp8"}
GGML_CACHES = {"16bit": 1, "q8_0": 8, "q4_0": 2}


def check_engine(
    engine: str,
    artifacts: tuple[str, ...],
    tensor_parallel: int | None = None,
    cache: str | None = None,
    arguments: tuple[str, ...] = (),
) -> None:
    """Refuse an engine that is not installed or cannot do what is asked for: InputError, before any work."""
    if engine != "vllm" and (tensor_parallel is not None or arguments):
        option, why = ("--engine-arg", "has none here") if arguments else ("--tensor-parallel", "runs on the CPU here")
        raise InputError(f"{option}: {engine} {why}, expected --engine vllm")
    package, extra = ("xllamacpp", "mmquant[llamacpp]") if engine == "llama.cpp" else ("vllm", "vllm")
    if importlib.util.find_spec(package) is None:
        raise InputError(f"--engine {engine}: {package} is not installed, expected pip install '{extra}'")
    for artifact in artifacts:
        gguf = Path(artifact).suffix == ".gguf" or (Path(artifact).is_dir() and any(Path(artifact).glob("*.gguf")))
        if gguf != (engine == "llama.cpp"):
            kind = "a GGUF file" if engine == "llama.cpp" else "a folder of safetensors"
            raise InputError(f"--engine {engine}: {artifact} is not {kind}")
    caches = GGML_CACHES if engine == "llama.cpp" else VLLM_CACHES
    if cache is not None and cache not in caches:
        raise InputError(f"--cache {cache}: {engine} has none, expected {' or '.join(caches)}")
    if engine == "vllm":
        devices_for(tensor_parallel, torch.cuda.device_count())
        vllm_arguments(arguments)


def cross_check(
    engine: str,
    artifacts: tuple[str, ...],
    reference: str | None,
    stored: Path,
    sample: Sample,
    result: dict[str, Any],
    *,
    threads: int = 1,
    tensor_parallel: int | None = None,
    cache: str | None = None,
    arguments: tuple[str, ...] = (),
) -> dict[str, Any]:
    """`engine_check` of the result: the engine's numbers of each candidate and their distance from ours."""
    seed = result["sample"]["interval"]["seed"]
    given = vllm_arguments(arguments) if engine == "vllm" else {}
    own = engine == "llama.cpp" and reference is not None and Path(reference).suffix == ".gguf"
    if engine == "llama.cpp":
        base = Path(str(reference)) if own else StoredReference(stored)
        scores, version = llamacpp_scores(base, [Path(a) for a in artifacts], sample, threads, cache)
    else:
        kind = None if cache is None else VLLM_CACHES[cache]
        with stdout_to_stderr():  # stdout is the result's
            scores, version = vllm_scores(StoredReference(stored), artifacts, sample, tensor_parallel, kind, given)
    rows = []
    for candidate, found in zip(result["candidates"], scores, strict=True):
        numbers = summarise(found.scores, sample.units(), seed)
        seconds = {"load": round(found.load, 2), "score": round(found.score, 2)}
        more = {"difference": difference(candidate, numbers), "seconds": seconds}
        rows.append({"label": candidate["label"], **numbers, **more})
    by = engine if own else "mmquant"
    how = {"version": version, "reference": by, "cache": cache, "arguments": given}
    return {"engine": engine, **how, "candidates": rows}


def difference(streamed: dict[str, Any], engine: dict[str, Any]) -> dict[str, float | None]:
    """Relative differences engine / streamed - 1 of the numbers that both have; of KLD the absolute one in nats."""
    found: dict[str, float | None] = {}
    for name in COMPARED:
        ours, its = streamed[name], engine[name]
        found[name] = its / ours - 1 if ours and its is not None else None
    ours, its = streamed["kld"]["mean"], engine["kld"]["mean"]
    found["kld_mean_nats"] = its - ours if ours is not None and its is not None else None
    return found


def llamacpp_scores(
    base: Path | StoredReference, artifacts: list[Path], sample: Sample, threads: int = 1, cache: str | None = None
) -> tuple[list[EngineScores], str]:
    """Scores of GGUF files by llama.cpp, and its version; `base`: a GGUF file or stored reference.

    cache: the type of the candidates' keys and values; the reference's are float16.
    """
    from .llamacpp import LlamaModel, version

    scores: list[list[Scores]] = [[] for _ in artifacts]
    load, score = [0.0] * len(artifacts), [0.0] * len(artifacts)
    kind = None if cache is None else GGML_CACHES[cache]
    with ExitStack() as stack:
        truth = None
        if isinstance(base, Path):
            truth = stack.enter_context(LlamaModel(find_parts(base)[0], sample.context, threads))
        models: list[LlamaModel] = []
        for number, path in enumerate(artifacts):
            with _timed(load, number):
                model = LlamaModel(find_parts(path)[0], sample.context, threads, cache=kind)
            models.append(stack.enter_context(model))
        at = 0
        for window, first in zip(sample.tokens, sample.first.tolist(), strict=True):
            ids, target = window.tolist(), window[first + 1 :]
            whole = None if truth is None else torch.from_numpy(truth.logits(ids, first)[:-1])
            for number, model in enumerate(models):
                with _timed(score, number):
                    logits = torch.from_numpy(model.logits(ids, first)[:-1])
                if isinstance(base, Path):
                    assert whole is not None
                    scores[number].append(compare(whole, logits, target))
                else:
                    scores[number].append(compare_stored(base.rows(at, at + len(target)), logits, target))
            at += len(target)
    found = zip(scores, load, score, strict=True)
    return [EngineScores(join_metrics(parts), *seconds) for parts, *seconds in found], version()


@contextmanager
def _timed(seconds: list[float], number: int) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[number] += time.monotonic() - started
