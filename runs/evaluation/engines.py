"""Evaluate with a real engine beside the streamed pass: llama.cpp on GGUF files, vLLM on folders.

llama.cpp gives whole logits through its C API (llamacpp.py); where the reference is a GGUF file too, its logits
come from llama.cpp as well, and the numbers are those of llama-perplexity. vLLM gives the log-probabilities of a
prompt's tokens: the most probable ones, the rest as one mass. Otherwise the reference is the streamed one, as stored.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmquant.errors import InputError

from ...calibration.evaluate.metrics import Scores, compare, join_metrics, summarise
from ...calibration.evaluate.reference_store import Rows, StoredReference, compare_stored
from ...calibration.text.sample import Sample
from ...convert.gguf.reader import find_parts
from .stdout import stdout_to_stderr

COMPARED = ("ppl", "ppl_ratio", "top1")
LEAST = 1e-12  # mass of the tokens that an engine does not name, when rounding leaves none
VLLM_TOP = 1024  # log-probabilities of each position that vLLM is asked for


def check_engine(engine: str, artifacts: tuple[str, ...]) -> None:
    """Refuse an engine that is not installed or cannot open the artifacts: InputError, before any work."""
    package, extra = ("xllamacpp", "mmquant[llamacpp]") if engine == "llama.cpp" else ("vllm", "vllm")
    if importlib.util.find_spec(package) is None:
        raise InputError(f"--engine {engine}: {package} is not installed, expected pip install '{extra}'")
    for artifact in artifacts:
        gguf = Path(artifact).suffix == ".gguf" or (Path(artifact).is_dir() and any(Path(artifact).glob("*.gguf")))
        if gguf != (engine == "llama.cpp"):
            kind = "a GGUF file" if engine == "llama.cpp" else "a folder of safetensors"
            raise InputError(f"--engine {engine}: {artifact} is not {kind}")


def cross_check(
    engine: str,
    artifacts: tuple[str, ...],
    reference: str | None,
    stored: Path,
    sample: Sample,
    result: dict[str, Any],
    threads: int = 1,
) -> dict[str, Any]:
    """`engine_check` of the result: the engine's numbers of each candidate and their distance from ours."""
    seed = result["sample"]["interval"]["seed"]
    own = engine == "llama.cpp" and reference is not None and Path(reference).suffix == ".gguf"
    if engine == "llama.cpp":
        base = Path(str(reference)) if own else StoredReference(stored)
        scores, version = llamacpp_scores(base, [Path(a) for a in artifacts], sample, threads)
    else:
        with stdout_to_stderr():  # stdout is the result's
            scores, version = vllm_scores(StoredReference(stored), artifacts, sample)
    rows = []
    for candidate, found in zip(result["candidates"], scores, strict=True):
        numbers = summarise(found, sample.units(), seed)
        rows.append({"label": candidate["label"], **numbers, "difference": difference(candidate, numbers)})
    return {"engine": engine, "version": version, "reference": engine if own else "mmquant", "candidates": rows}


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
    base: Path | StoredReference, artifacts: list[Path], sample: Sample, threads: int = 1
) -> tuple[list[Scores], str]:
    """Scores of GGUF files by llama.cpp, window by window, and its version; `base`: a GGUF file or stored reference."""
    from .llamacpp import LlamaModel, version

    scores: list[list[Scores]] = [[] for _ in artifacts]
    paths = [base, *artifacts] if isinstance(base, Path) else artifacts
    with ExitStack() as stack:
        models = [stack.enter_context(LlamaModel(find_parts(p)[0], sample.context, threads)) for p in paths]
        at = 0
        for window, first in zip(sample.tokens, sample.first.tolist(), strict=True):
            ids, target = window.tolist(), window[first + 1 :]
            logits = [torch.from_numpy(model.logits(ids, first)[:-1]) for model in models]
            if isinstance(base, Path):
                found = [compare(logits[0], part, target) for part in logits[1:]]
            else:
                rows = base.rows(at, at + len(target))
                found = [compare_stored(rows, part, target) for part in logits]
            at += len(target)
            for kept, part in zip(scores, found, strict=True):
                kept.append(part)
    return [join_metrics(parts) for parts in scores], version()


def vllm_scores(stored: StoredReference, artifacts: tuple[str, ...], sample: Sample) -> tuple[list[Scores], str]:
    """Scores of folders by vLLM's prompt log-probabilities, and its version.

    Source: vllm/sampling_params.py; a request's `prompt_logprobs` holds None for the first token, then for each token
    of the prompt the most probable ones at its place and itself, by id.
    """
    import gc

    import vllm  # pyright: ignore[reportMissingImports]

    found = []
    settings = vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=VLLM_TOP, detokenize=False)
    for artifact in artifacts:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # vLLM claims 90 % of the memory and refuses to start with less
        model = vllm.LLM(
            model=artifact,
            max_model_len=sample.context + 1,
            max_logprobs=VLLM_TOP,
            enforce_eager=True,  # compiling takes longer than the windows do
            tensor_parallel_size=_parallel(torch.cuda.device_count()),
        )
        parts, at = [], 0
        for window, first in zip(sample.tokens, sample.first.tolist(), strict=True):
            prompt = {"prompt_token_ids": window.tolist()}
            tops = model.generate([prompt], settings, use_tqdm=False)[0].prompt_logprobs
            positions = [{token: entry.logprob for token, entry in top.items()} for top in tops[first + 1 :]]
            rows = stored.rows(at, at + len(positions))
            parts.append(compare_tops(rows, positions, window[first + 1 :]))
            at += len(positions)
        found.append(join_metrics(parts))
        del model
        gc.collect()
    return found, str(vllm.__version__)


def _parallel(devices: int) -> int:
    """GPUs that vLLM splits a model over: a power of 2, 4 at most (8 would cut down's groups of 128)."""
    return 4 if devices >= 4 else 2 if devices >= 2 else 1


def compare_tops(base: Rows, tops: list[dict[int, float]], target: Tensor) -> Scores:
    """Scores of a candidate known by log-probabilities of some tokens a position (the true next one among them).

    The tokens that both sides know are compared one by one, all others as one mass: never above the exact KLD.
    """
    ends = np.concatenate([[0], np.cumsum(base.count)])
    rows = list(_positions(base, ends, tops, target.tolist()))
    columns = [np.array(values) for values in zip(*rows, strict=True)]
    nll, kld, same, finite = columns
    shift = np.exp(-nll) - np.exp(-base.nll)
    return Scores(nll, base.nll, np.maximum(kld, 0.0), shift, same & finite, finite)


def _positions(
    base: Rows, ends: NDArray[np.int64], tops: list[dict[int, float]], target: list[int]
) -> Iterator[tuple[float, float, bool, bool]]:
    """(nll, kld, same top token, finite) of each position."""
    for i, top in enumerate(tops):
        ids, logp = base.ids[ends[i] : ends[i + 1]], base.logp[ends[i] : ends[i + 1]]
        if target[i] not in top:
            raise InputError(f"engine: no log-probability of token {target[i]}, expected the prompt's own tokens")
        known = np.array([token in top for token in ids.tolist()])
        engine_value = np.array([top[token] for token in ids[known].tolist()])
        finite = bool(np.isfinite(list(top.values())).all())
        total = np.log(np.exp(logp).sum() + np.exp(base.tail[i]))
        p, rest = np.exp(logp - total), float(np.exp(base.tail[i] - total))
        rest += float(p[~known].sum())
        kld = float((p[known] * (logp[known] - total - engine_value)).sum()) if finite else 0.0
        if finite and rest > 0:
            kld += rest * float(np.log(rest / max(1 - np.exp(engine_value).sum(), LEAST)))
        yield -top[target[i]], kld, max(top, key=lambda token: top[token]) == ids[0], finite
