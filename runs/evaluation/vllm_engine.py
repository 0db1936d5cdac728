"""Ask vLLM for the log-probabilities of each prompt's tokens, and score a candidate that is known by those alone.

Source: vllm/sampling_params.py and vllm/logprobs.py (0.26 to 0.33): a request's `prompt_logprobs` holds nothing for the
first token, then for each token of the prompt itself and the most probable ones at its place. With `flat_logprobs` they
are lists of a whole prompt (`token_ids`, `logprobs`, `start_indices`, `end_indices`) instead of objects.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmquant.errors import InputError, MmquantError

from ...calibration.evaluate.metrics import BLOCK_BYTES, Scores, join_metrics
from ...calibration.evaluate.reference_store import Rows, StoredReference
from ...calibration.text.sample import Sample
from ..engine_args import check_known, parse_arguments
from ..memory import is_out_of_memory
from .stdout import stdout_to_stderr

TOP = 1024  # log-probabilities of each position that vLLM is asked for
PROMPT_TOKENS = 8192  # in one call: their log-probabilities are held at once
LEAST = 1e-12  # mass of the tokens that an engine does not name, when rounding leaves none
MOST_DEVICES = 4  # 8 would cut down's groups of 128
# What scoring needs, and a user may replace. Beside the memory that it claims vLLM holds float32 logits of a step's
# tokens over the whole vocabulary, and their softmax: with its default of 16,384 tokens 13 GB each for M2.7.
DEFAULTS: dict[str, Any] = {"enforce_eager": True, "max_num_batched_tokens": 2048, "max_num_seqs": 64}
# What is set here, and the option that sets it.
OWN = {
    "model": "an ARTIFACT",
    "max_model_len": "--context",
    "tensor_parallel_size": "--tensor-parallel",
    "kv_cache_dtype": "--cache",
    "max_logprobs": "it left out",
    "logprobs_mode": "it left out",
    "enable_prefix_caching": "it left out",
    "skip_tokenizer_init": "it left out",
}


@dataclass(frozen=True)
class Tops:
    """Some tokens' log-probabilities at n positions: `count` [n] entries of the flat ids and logp."""

    count: NDArray[np.int64]
    ids: NDArray[np.int64]
    logp: NDArray[np.float64]

    def part(self, start: int, stop: int) -> Tops:
        """Positions start..stop-1."""
        ends = np.concatenate([[0], np.cumsum(self.count)])
        flat = slice(int(ends[start]), int(ends[stop]))
        return Tops(self.count[start:stop], self.ids[flat], self.logp[flat])


@dataclass(frozen=True)
class EngineScores:
    """What an engine says of one artifact: its scores, the seconds to load it and those of all windows."""

    scores: Scores
    load: float
    score: float


def devices_for(wanted: int | None, found: int) -> int:
    """GPUs that vLLM splits a model over: those asked for, else a power of 2, 4 at most. InputError for too many."""
    if wanted is None:
        return next(size for size in (MOST_DEVICES, 2, 1) if size <= max(1, found))
    if wanted > found:
        raise InputError(f"--tensor-parallel {wanted}: this machine has {found} CUDA devices")
    return wanted


def vllm_arguments(words: tuple[str, ...]) -> dict[str, Any]:
    """Arguments of vLLM's engine that --engine-arg names. InputError for one that this vLLM does not have."""
    found = parse_arguments(words, OWN)
    if found:
        with stdout_to_stderr():  # it prints while it is imported
            from vllm import EngineArgs  # pyright: ignore[reportMissingImports]
        check_known(found, (field.name for field in fields(EngineArgs)), "vllm")
    return found


def vllm_scores(
    stored: StoredReference,
    artifacts: tuple[str, ...],
    sample: Sample,
    tensor_parallel: int | None = None,
    cache: str | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> tuple[list[EngineScores], str]:
    """Scores of folders by vLLM's prompt log-probabilities, and its version.

    cache: its kv_cache_dtype. arguments: of its engine, beside those set here. MmquantError when it does not start.
    """
    import vllm  # pyright: ignore[reportMissingImports]

    found = []
    devices = devices_for(tensor_parallel, torch.cuda.device_count())
    settings = vllm.SamplingParams(
        max_tokens=1, temperature=0.0, prompt_logprobs=TOP, flat_logprobs=True, detokenize=False
    )
    own = {
        "max_model_len": sample.context + 1,
        "max_logprobs": TOP,
        "tensor_parallel_size": devices,
        "enable_prefix_caching": False,
        "kv_cache_dtype": cache or "auto",
    }
    for artifact in artifacts:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # vLLM claims 92 % of the memory and refuses to start with less
        started = time.monotonic()
        model = _opened(artifact, {**DEFAULTS, **(arguments or {}), **own})
        loaded = time.monotonic()
        scores = join_metrics(list(_windows(model, settings, stored, sample)))
        found.append(EngineScores(scores, loaded - started, time.monotonic() - loaded))
        _close(model)
        del model
        gc.collect()
    return found, str(vllm.__version__)


def _opened(artifact: str, arguments: Mapping[str, Any]) -> Any:  # noqa: ANN401 - vLLM's
    """An engine of the artifact. MmquantError with what vLLM says when it has none; all of it went to stderr."""
    import vllm  # pyright: ignore[reportMissingImports]

    try:
        return vllm.LLM(model=artifact, **arguments)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        said = str(error).partition("[type=")[0]  # pydantic adds its input and an address
        raise MmquantError(f"vllm: {artifact}: {type(error).__name__}: {' '.join(said.split())[:300]}") from error


def _close(model: Any) -> None:  # noqa: ANN401 - vLLM's, which has no types here
    """End the engine's processes: a second model does not fit beside the first."""
    core = getattr(getattr(model, "llm_engine", None), "engine_core", None)
    shutdown = getattr(core, "shutdown", None)
    if shutdown is not None:
        shutdown()


def _windows(model: Any, settings: Any, stored: StoredReference, sample: Sample) -> Iterator[Scores]:  # noqa: ANN401
    at, step = 0, max(1, PROMPT_TOKENS // sample.context)
    for start in range(0, sample.windows, step):
        windows = sample.tokens[start : start + step]
        prompts = [{"prompt_token_ids": window.tolist()} for window in windows]
        answers = model.generate(prompts, settings, use_tqdm=False)
        for window, first, answer in zip(windows, sample.first[start : start + step].tolist(), answers, strict=True):
            tops = tops_of(answer.prompt_logprobs, sample.context).part(first, sample.context - 1)
            rows = stored.rows(at, at + len(tops.count))
            yield compare_tops(rows, tops, window[first + 1 :])
            at += len(tops.count)


def tops_of(answer: Any, tokens: int) -> Tops:  # noqa: ANN401 - vLLM's FlatLogprobs, or a list of dicts
    """What vLLM returned for a prompt of so many tokens, but for its first. InputError where it returned none."""
    if answer is None or len(answer) != tokens:
        found = "nothing" if answer is None else f"{len(answer)} positions"
        raise InputError(f"engine: {found}, expected the log-probabilities of a prompt of {tokens} tokens")
    if hasattr(answer, "token_ids"):
        starts, ends = (np.asarray(getattr(answer, name), np.int64)[1:] for name in ("start_indices", "end_indices"))
        flat = slice(int(starts[0]), int(ends[-1]))
        ids, logp = np.asarray(answer.token_ids, np.int64)[flat], np.asarray(answer.logprobs, np.float64)[flat]
        return Tops(ends - starts, ids, logp)
    kept = list(answer)[1:]
    ids = np.array([token for top in kept for token in top], np.int64)
    logp = np.array([entry.logprob for top in kept for entry in top.values()], np.float64)
    return Tops(np.array([len(top) for top in kept], np.int64), ids, logp)


def compare_tops(base: Rows, tops: Tops, target: Tensor) -> Scores:
    """Scores of a candidate known by log-probabilities of some tokens a position (the true next one among them).

    The tokens that both sides know are compared one by one, all others as one mass: never above the exact KLD.
    """
    vocab = 1 + int(max(base.ids.max(initial=0), tops.ids.max(initial=0), target.max() if len(target) else 0))
    step = max(1, BLOCK_BYTES // (8 * vocab))
    ends = np.concatenate([[0], np.cumsum(base.count)])
    parts = []
    for start in range(0, len(base), step):
        stop = min(start + step, len(base))
        flat = slice(int(ends[start]), int(ends[stop]))
        part = slice(start, stop)
        rows = Rows(base.count[part], base.nll[part], base.tail[part], base.ids[flat], base.logp[flat])
        parts.append(_compare(rows, tops.part(start, stop), target[part].numpy(), vocab))
    return join_metrics(parts)


def _compare(base: Rows, tops: Tops, target: NDArray[np.int64], vocab: int) -> Scores:
    n = len(base)
    where, row = np.repeat(np.arange(n), tops.count), np.repeat(np.arange(n), base.count)
    engine = np.full((n, vocab), -np.inf)
    named = np.zeros((n, vocab), np.bool_)
    engine[where, tops.ids], named[where, tops.ids] = tops.logp, True
    missing = ~named[np.arange(n), target]
    if missing.any():
        token = target[missing.argmax()]
        raise InputError(f"engine: no log-probability of token {token}, expected the prompt's own tokens")
    finite = np.bincount(where, ~np.isfinite(tops.logp), n) == 0
    value, known = engine[row, base.ids], named[row, base.ids]
    total = np.log(np.bincount(row, np.exp(base.logp), n) + np.exp(base.tail))
    logp = base.logp - total[row]
    mass = np.exp(logp)
    with np.errstate(invalid="ignore"):
        kld = np.bincount(row, np.where(known, mass * (logp - value), 0.0), n)
        left = 1 - np.bincount(row, np.where(known, np.exp(value), 0.0), n)
        rest = np.exp(base.tail - total) + np.bincount(row, np.where(known, 0.0, mass), n)
        kld += np.where(rest > 0, rest * np.log(np.maximum(rest, LEAST) / np.maximum(left, LEAST)), 0.0)
    first = base.ids[np.cumsum(base.count) - base.count]
    nll = -engine[np.arange(n), target]
    same = (engine.argmax(1) == first) & finite
    shift = np.exp(-nll) - np.exp(-base.nll)
    return Scores(nll, base.nll, np.where(finite, np.maximum(kld, 0.0), 0.0), shift, same, finite)
