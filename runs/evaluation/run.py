"""Evaluate artifacts against a reference (`mmquant eval`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmquant.errors import InputError
from mmquant.monitor import Monitor, current, phase, watching

from ..models import choose_device, close_model, open_any
from ..options_use import EvalOptions
from ..output import check_output
from ..results import Result

if TYPE_CHECKING:
    from ...calibration.evaluate.settings import Settings
    from ...calibration.model.engine_like import Like
    from ...calibration.text.sample import Sample
    from ...convert.hub.store import FetchOptions
    from ...convert.source import Source


@dataclass(frozen=True)
class Evaluation(Result):
    """Scores of artifacts against a reference: `document` is what `eval --json` prints (schema in data/schema)."""

    artifacts: tuple[str, ...]
    document: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """What `eval --json` prints."""
        return self.document

    def rows(self) -> list[dict[str, Any]]:
        """One row a candidate."""
        names = ("label", "bytes", "bits_per_weight", "ppl", "ppl_ratio", "top1", "nonfinite")
        candidates = self.document["candidates"]
        kld = ({"kld": c["kld"]["mean"], "kld_p999": c["kld"]["p999"]} for c in candidates)
        return [{n: c.get(n) for n in names} | more for c, more in zip(candidates, kld, strict=True)]

    def table(self) -> str:
        """The same for people."""
        from .table import table

        return table(self.document)

    def compare(self, first: str, second: str) -> dict[str, Any]:
        """How much nearer candidate `first` is than `second`, by label: a paired bootstrap over the same positions.

        `verdict` is better, worse, or no difference shown. InputError for a label that no candidate has.
        """
        from .claims import paired

        by_label = {candidate["label"]: candidate for candidate in self.document["candidates"]}
        for label in (first, second):
            if label not in by_label:
                raise InputError(f"compare: no candidate {label}, expected one of {', '.join(by_label)}")
        return paired(by_label[first], by_label[second], self.document["sample"]["interval"]["seed"])

    @property
    def failure(self) -> str | None:
        """The first quality gate that failed; positions that are not finite always fail."""
        return next(iter(self.document["gate"]["failures"]), None)

    def record(self) -> None:
        """Put each candidate's quality into the manifest of its folder, where there is one."""
        record(self.artifacts, self.document)

    def write_html(self, path: Path) -> None:
        """A report with plots, if matplotlib is installed."""
        from ..reports.evaluation import write_report

        write_report(path, self.document)


def evaluate(
    artifacts: str | Path | Sequence[str | Path],
    reference: str | Path | None = None,
    options: EvalOptions | None = None,
    *,
    gates: Mapping[str, float] | None = None,
    device: str | None = None,
    fetch: FetchOptions | None = None,
    monitor: Monitor | None = None,
) -> Evaluation | None:
    """Score artifacts (folders in any format mmquant reads, GGUF files) against a reference, in one streamed pass.

    gates     thresholds by name: max_ppl_ratio, max_kld, max_kld_p99, max_kld_p999, min_top1
    device    cpu, cuda or cuda:N; by default a GPU when there is one

    None where there was only a reference to save, and on every rank of torchrun but the first. The manifests of the
    artifacts stay as they are until `record`.

    Raises InputError when an artifact is another model's or was calibrated on the text.
    """
    from .result import apply_gate, check_gate, validate

    chosen = options or EvalOptions()
    check_output("--save-reference", chosen.save_reference)
    thresholds = check_gate(dict(gates or {}), "gate")
    paths = (str(artifacts),) if isinstance(artifacts, str | Path) else tuple(str(path) for path in artifacts)
    with watching(monitor):
        against = None if reference is None else str(reference)
        found = run(paths, against, chosen, device=choose_device(device), fetch=fetch)
    if found is None:
        return None
    apply_gate(found, thresholds)
    validate(found)
    return Evaluation(paths, found)


def run(
    artifacts: tuple[str, ...],
    reference: str | None,
    options: EvalOptions,
    *,
    device: str = "cpu",
    fetch: FetchOptions | None = None,
) -> dict[str, Any] | None:
    """The result document of `mmquant eval`; None on every rank but the first, and where there was only to save."""
    from ...calibration.model.distributed import current_ranks, rank_device
    from .claims import make_claims
    from .text import make_eval_sample

    check_asked(artifacts, reference, options)
    with ExitStack() as stack:
        truth, candidates = opened_all(artifacts, reference, fetch, stack)
        basis = truth if truth is not None else candidates[0]
        settings = settings_of(str(rank_device(device)), options)
        check_likes(settings.likes, candidates)
        sample = make_eval_sample(basis, artifacts, options)
        ranks = current_ranks()
        if ranks.first:
            _check_bytes(artifacts)
        if options.engine != "mmquant":
            if ranks.world > 1:
                raise InputError(f"--engine {options.engine}: runs in one process, expected no torchrun")
            result = _with_engine(artifacts, reference, truth, candidates, sample, settings, options)
        else:
            result = measure(truth, candidates, sample, settings, options)
        if ranks.first and candidates:
            result["claims"] = make_claims(result, options.better_than)
        for source in (*candidates, *filter(None, [truth])):
            close_model(source, finished=True)
        return result if ranks.first and candidates else None


def check_asked(artifacts: tuple[str, ...], reference: str | None, options: EvalOptions) -> None:
    """InputError for what cannot be done, before any work."""
    from .claims import check_rivals

    if reference is None and options.reference_logits is None:
        raise InputError("eval: no --reference, expected a model to compare with (or --reference-logits FILE)")
    if not artifacts and options.save_reference is None:
        raise InputError("eval: no artifact, expected at least one folder or GGUF file (or --save-reference FILE)")
    check_rivals(options.better_than, artifacts)
    if options.engine != "mmquant":
        from .engines import check_engine

        check_engine(options.engine, artifacts, options.tensor_parallel, options.cache, options.engine_arg)
    elif options.tensor_parallel is not None or options.engine_arg:
        option = "--tensor-parallel" if options.tensor_parallel is not None else "--engine-arg"
        raise InputError(f"{option}: of an engine, expected --engine vllm beside it")


def opened_all(
    artifacts: tuple[str, ...], reference: str | None, fetch: FetchOptions | None, stack: ExitStack
) -> tuple[Source | None, list[Source]]:
    """The reference (None: only its stored logits) and the candidates, of one model; closed with the stack."""
    from ...calibration.text.vocabulary import check_same_model, check_same_tokenizer

    candidates = [_opened(artifact, fetch, stack) for artifact in artifacts]
    truth = _opened(reference, fetch, stack) if reference is not None else None
    basis = truth if truth is not None else candidates[0]
    for candidate in candidates:
        check_same_model(basis.geometry, candidate)
        check_same_tokenizer(basis, candidate)
    return truth, candidates


def _check_bytes(artifacts: tuple[str, ...]) -> None:
    """The quality goes into the manifest: what is scored must be the bytes that it names."""
    from ...convert.manifest import check_files
    from .text import manifest_folder

    for artifact in artifacts:
        if manifest_folder(artifact).is_dir():
            check_files(manifest_folder(artifact))


def _opened(model: str, fetch: FetchOptions | None, stack: ExitStack) -> Source:
    """A model to score, complete as far as its headers tell; closed with the stack."""
    source = open_any(model, fetch)
    stack.callback(close_model, source)
    source.validate()
    for note in source.notes:
        current().message(note)
    return source


def _with_engine(
    artifacts: tuple[str, ...],
    reference: str | None,
    truth: Source | None,
    candidates: list[Source],
    sample: Sample,
    settings: Settings,
    options: EvalOptions,
) -> dict[str, Any]:
    """The streamed result with the engine's beside it."""
    import tempfile

    import torch

    from .engines import cross_check

    with tempfile.TemporaryDirectory(prefix="mmquant-eval-") as folder:
        saved = options.save_reference or (None if options.reference_logits else Path(folder) / "reference")
        result = measure(truth, candidates, sample, settings, replace(options, save_reference=saved))
        stored = options.reference_logits or saved
        assert stored is not None
        # torch's own number of threads, so that OMP_NUM_THREADS rules both.
        result["engine_check"] = cross_check(
            *(options.engine, artifacts, reference, stored, sample, result),
            threads=torch.get_num_threads(),
            tensor_parallel=options.tensor_parallel,
            cache=options.cache,
            arguments=options.engine_arg,
        )
    return result


def measure(
    truth: Source | None, candidates: list[Source], sample: Sample, settings: Settings, options: EvalOptions
) -> dict[str, Any]:
    """The streamed pass and its result document; every rank gets the same."""
    from ...calibration.evaluate.reference_store import StoredReference
    from ...calibration.evaluate.streamed import evaluate
    from ...calibration.model.distributed import current_ranks
    from ...calibration.text.vocabulary import tokenizer_digest
    from .result import document

    ranks = current_ranks()
    against: Source | StoredReference
    if options.reference_logits is not None:
        stored = StoredReference(options.reference_logits)
        tokenizer = tokenizer_digest(truth if truth is not None else candidates[0])
        stored.check(sample, truth, tokenizer, settings.activations)
        against, made_of = stored, {"label": stored.label, "stored": stored.made_of}
        made_of["fingerprint"] = stored.made_of["model"]
    else:
        assert truth is not None
        against, made_of = truth, {"label": truth.label, "fingerprint": truth.fingerprint, "stored": None}
    with phase("eval", None, "layer") as bar:
        at = 0

        def progress(done: int, total: int) -> None:
            nonlocal at
            bar.expect(total)
            bar.advance(done - at)
            at = done

        save = options.save_reference
        outcomes = evaluate(against, candidates, sample, settings, ranks=ranks, save=save, progress=progress)
    dtype = str(settings.dtype).removeprefix("torch.")
    facts = {"seed": options.seed, "dtype": dtype, "activations": settings.activations, "likes": settings.likes}
    return document(outcomes, sample, candidates, made_of, **facts)


def settings_of(device: str, options: EvalOptions) -> Settings:
    """How a pass is computed. InputError for what contradicts itself."""
    import torch

    from ...calibration.evaluate.settings import Settings
    from ...calibration.model.engine_like import like_of

    activations = options.activations or ("llama.cpp" if options.convention == "llama.cpp" else "exact")
    likes = tuple(like_of(name, options.cache) for name in dict.fromkeys(options.engine_like) if name != "exact")
    if options.cache is not None and not likes and options.engine == "mmquant":
        raise InputError(f"--cache {options.cache}: of an engine, expected --engine or --engine-like beside it")
    cuda, rounded = device.startswith("cuda"), activations != "exact" or bool(likes)
    chosen = options.dtype or ("bfloat16" if cuda and not rounded else "float32")
    if activations != "exact" and (options.floor or likes or chosen != "float32"):
        what = "--floor" if options.floor else "--engine-like" if likes else f"--dtype {chosen}"
        raise InputError(f"eval: {what} with activations rounded as llama.cpp does, expected --activations exact")
    if rounded and chosen != "float32":
        raise InputError(f"eval: --dtype {chosen} with --engine-like, expected float32")
    tokens, dtype = options.batch_tokens or (16384 if cuda else 8192), getattr(torch, chosen)
    runs = options.floor_runs if options.floor else 0
    return Settings(
        *(device, dtype, tokens),
        state=options.state,
        floor=options.floor,
        floor_seeds=runs,
        floor_orders=runs,
        activations=activations,
        likes=likes,
    )


def check_likes(likes: tuple[Like, ...], candidates: list[Source]) -> None:
    """InputError for a profile whose engine opens none of the artifacts."""
    for like in likes:
        if candidates and not any(like.opens(candidate) for candidate in candidates):
            expected = "a GGUF file" if like.profile.engine == "llama.cpp" else "a folder of safetensors"
            raise InputError(f"--engine-like {like.name}: opens none of the artifacts, expected {expected}")


def record(artifacts: tuple[str, ...], result: dict[str, Any]) -> None:
    """Put each candidate's quality into the manifest of its folder, where there is one."""
    from ...convert.manifest import MANIFEST, set_quality
    from .result import quality_block
    from .text import manifest_folder

    for artifact, candidate in zip(artifacts, result["candidates"], strict=True):
        folder = manifest_folder(artifact)
        if (folder / MANIFEST).is_file():
            set_quality(folder, quality_block(result, candidate))
