"""Hostile hub answers and files load to something valid, or are refused in one line that names them.

Never another exception, never a write outside the folder, never memory beyond a small multiple of the file.
"""

from __future__ import annotations

import json
import resource
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from helpers.calibration_cases import model, run
from helpers.ct_reader import copy_of
from helpers.exl3 import random_parts, write_exl3
from helpers.fuzz import mutants
from helpers.paths import GOLDEN
from helpers.tiny import write_tiny
from helpers.widths import mixed
from mmquant.calibration.evaluate.reference_store import MAGIC, StoredReference
from mmquant.calibration.statistics.store import open_statistics
from mmquant.calibration.text.chat import Chat, ChatTemplate, load_template
from mmquant.calibration.text.tokenizer import load_tokenizer
from mmquant.calibration.text.vocabulary import read_vocabulary
from mmquant.convert import manifest
from mmquant.convert.checkpoints.checkpoint import Checkpoint
from mmquant.convert.checkpoints.quantized_folder import QuantizedFolder
from mmquant.convert.checkpoints.store import LocalFolder, shard_names
from mmquant.convert.files.progress import read_state
from mmquant.convert.files.together import JOURNAL, interrupted
from mmquant.convert.gguf.header import read_header
from mmquant.convert.gguf.imatrix import Imatrix, Importance, read_imatrix, write_imatrix
from mmquant.convert.gguf.metadata import tokenizer_keys
from mmquant.convert.hub import huggingface, modelscope_list
from mmquant.convert.hub.listing import RepoSpec
from mmquant.convert.hub.push import LEDGER, Ledger
from mmquant.convert.open import demo_folder, open_source
from mmquant.errors import MmquantError
from mmquant.runs.gguf_plan import read_types

QUICK, LONG = 300, 100_000  # inputs of each kind
MEMORY = 256 << 20  # growth of the process over all inputs of a kind; the files are below 1 MiB
CHAT = Chat(({"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day."}), ())


@dataclass(frozen=True)
class Kind:
    """A file of a valid folder, and what reads it. header: bytes of a binary header, None for JSON."""

    file: str
    load: Callable[[Path], object]
    header: Callable[[bytes], int] | None = None
    share: int = 1  # one in so many inputs of the short form: for readers that take milliseconds


def listing_hf(path: Path) -> None:
    huggingface.files_of(path.read_bytes(), path.name)


def listing_ms(path: Path) -> None:
    entries, _ = modelscope_list.page_of(path.read_bytes(), path.name)
    modelscope_list.files_of(entries, path.name)


def checkpoint(path: Path) -> None:
    source = open_source(path.parent)
    if isinstance(source, Checkpoint):
        source.validate()


def quantized(path: Path) -> None:
    """All values of a quantized folder."""
    source = open_source(path.parent)
    source.validate()
    if isinstance(source, QuantizedFolder):
        for name in source.matrices:
            source.dequantize(name)


def index(path: Path) -> None:
    shard_names(LocalFolder(path.parent))


def shard(path: Path) -> None:
    tensors = LocalFolder(path.parent).header(path.name)
    assert sum(t.size for t in tensors) <= path.stat().st_size


def trellis(path: Path) -> None:
    source = open_source(path.parent)
    source.validate()
    for name in ("lm_head", "model.layers.0.self_attn.k_proj", "model.layers.0.block_sparse_moe.experts.1.w2"):
        source.read(f"{name}.weight")


class Small:
    """A source as far as its small files go."""

    def __init__(self, folder: Path) -> None:
        self.label, self.store, self.config = str(folder), LocalFolder(folder), json.loads(CONFIG.read_bytes())
        self.geometry = GEOMETRY
        self.small_file, self.file_names = self.store.small, self.store.files


CONFIG = demo_folder() / "config.json"
GEOMETRY = Checkpoint(LocalFolder(demo_folder())).geometry


def tokenizer(path: Path) -> None:
    source: object = Small(path.parent)
    for read in (read_vocabulary, tokenizer_keys, load_tokenizer):
        attempt(read, source)


def settings(path: Path) -> None:
    source: object = Small(path.parent)
    attempt(tokenizer_keys, source)
    template = load_template(source)  # type: ignore[arg-type]
    if template is not None:
        template.render(CHAT)


def attempt(read: Callable[..., object], source: object) -> None:
    """Each reader meets every file, also when one before it has refused it."""
    try:
        read(source)
    except MmquantError as error:
        check_line(error, "tokenizer")


def template(path: Path) -> None:
    text = path.read_bytes().decode("utf-8", errors="replace")
    ChatTemplate(text, {"bos_token": "<s>"}, path.name).render(CHAT)


def statistics(path: Path) -> None:
    found = open_statistics(path.parent)
    found.check(found.identity["model"])
    found.layer(0)
    found.squares(0)


def ledger(path: Path) -> None:
    """As push opens it; the repository itself is not asked."""
    remote: object = SimpleNamespace(spec=RepoSpec("hf", "me/m", "main"))
    found = Ledger(path.parent, remote)  # type: ignore[arg-type]
    found.committed()


KINDS = {
    "listing of Hugging Face": Kind("hf.json", listing_hf),
    "listing of ModelScope": Kind("ms.json", listing_ms),
    "index": Kind("model.safetensors.index.json", index),
    "config": Kind("config.json", checkpoint, share=4),
    "tokenizer": Kind("tokenizer.json", tokenizer),
    "tokenizer settings": Kind("tokenizer_config.json", settings),
    "chat template": Kind("chat_template.jinja", template, len),
    "imatrix": Kind("imatrix.gguf", read_imatrix, lambda data: 600),
    "statistics": Kind("stats/statistics.json", statistics),
    "layer statistics": Kind("stats/layer-000.safetensors", statistics, lambda data: 8 + word(data)),
    "progress": Kind(".mmquant-progress.json", lambda path: read_state(path.parent)),
    "manifest": Kind("mmquant.fit.json", lambda path: manifest.read(path.parent), share=4),
    "GGUF header": Kind("imatrix.gguf", read_header, lambda data: 600),
    "plan": Kind("plan.json", read_types),
    "push ledger": Kind(f"{LEDGER}.hf.me--m.json", ledger),
    "journal": Kind(JOURNAL, lambda path: interrupted(path.parent)),
    "reference logits": Kind("reference", lambda path: StoredReference(path).rows(0, 4), len),
    "EXL3 header": Kind("exl3/model.safetensors", trellis, lambda data: 8 + word(data), share=4),
    "EXL3 config": Kind("exl3/config.json", trellis, share=10),
    "AutoRound config": Kind("autoround/config.json", quantized, share=10),
    "AutoRound header": Kind("autoround/model.safetensors", quantized, lambda data: 8 + word(data), share=10),
    "AutoRound values": Kind("autoround/model.safetensors", quantized, len, share=10),
    "widths config": Kind("widths/config.json", quantized, share=10),
    "widths header": Kind("widths/model.safetensors", quantized, lambda data: 8 + word(data), share=10),
    "widths values": Kind("widths/model.safetensors", quantized, len, share=10),
    "safetensors header": Kind("model-00001-of-00001.safetensors", shard, lambda data: 8 + word(data)),
}


def word(data: bytes) -> int:
    return struct.unpack("<Q", data[:8])[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every kind of file is valid."""
    folder = write_tiny(tmp_path_factory.mktemp("whole") / "model", shards=1, num_hidden_layers=1, num_local_experts=2)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(demo_folder() / name, folder / name)
    (folder / "tokenizer.json").write_bytes(small_tokenizer())
    hf = {"type": "file", "path": "a/b.safetensors", "size": 7, "oid": "0" * 40}
    hf |= {"lfs": {"oid": "1" * 64, "size": 7, "pointerSize": 134}}
    ms = {"Path": "a/b.gguf", "Type": "blob", "Size": 7, "Sha256": "1" * 64, "Revision": "0" * 40, "CommittedDate": 9}
    (folder / "hf.json").write_text(json.dumps([hf, hf | {"path": "c"}]))
    (folder / "ms.json").write_text(
        json.dumps({"Success": True, "Data": {"Files": [ms], "LatestCommitter": {"Id": "0"}}})
    )
    state = {"run": {"command": "fp8"}, "plan": "f" * 64, "done": 1, "sha256": {"a": "0" * 64}}
    (folder / ".mmquant-progress.json").write_text(json.dumps(state))
    shutil.copy(Path(__file__).parent / "data" / "fit-example.json", folder / "mmquant.fit.json")
    (folder / "plan.json").write_text(json.dumps({"tensors": {"token_embd.weight": "Q8_0", "output.weight": "Q6_K"}}))
    entry = {"size": 7, "mtime_ns": 9, "sha256": "1" * 64, "state": "committed"}
    (folder / KINDS["push ledger"].file).write_text(json.dumps({"request": None, "files": {"a.gguf": entry}}))
    (folder / JOURNAL).write_text(json.dumps({"what": {"model": "m"}, "files": {"a.gguf": "1" * 64}}))
    small = write_tiny(folder.parent / "small", num_hidden_layers=1, num_local_experts=2)
    write_exl3(small, folder / "exl3", lambda name, values: random_parts(values.shape, 40, "mul1"))
    (folder / "reference").write_bytes(reference_logits())
    shutil.copytree(GOLDEN / "peer-autoround-mixed", folder / "autoround")
    copy_of("source-bf16", folder / "widths", mixed)
    ones = Importance(np.ones((2, 8), np.float32), np.ones(2, np.float32))
    write_imatrix(folder / "imatrix.gguf", Imatrix({"blk.0.attn_q.weight": ones}, ("text",), 1, 512))
    run(model(tmp_path_factory.mktemp("calibrated"), layers=1), folder / "stats", windows=2)
    return folder


def reference_logits() -> bytes:
    """A file of `eval --save-reference`: four positions of one token each, then the description."""
    rows = struct.pack("<4I", 1, 1, 1, 1) + bytes(8 * 4 + 6 * 4)  # one token is kept of each
    header = json.dumps({"blocks": [[4, 4]], "made_of": {"label": "m", "model": "f" * 64}}).encode()
    return MAGIC + rows + header + struct.pack("<QQ", len(MAGIC) + len(rows), len(header)) + MAGIC


def small_tokenizer() -> bytes:
    """A tokenizer of the release's form with few tokens."""
    full = json.loads((demo_folder() / "tokenizer.json").read_bytes())
    few = {token: number for token, number in full["model"]["vocab"].items() if number < 300 and len(token) == 1}
    full["model"] |= {"vocab": few, "merges": []}
    return json.dumps(full).encode()


def check_line(error: BaseException, name: str) -> None:
    """One line that names the file, its folder, or the shard that contradicts it."""
    text = str(error)
    assert "\n" not in text
    assert len(text) < 2000
    assert name in text or "/box/model" in text or ".safetensors: " in text or isinstance(error, OSError), (
        f"{text}: which file?"
    )


def fuzz(kind: Kind, folder: Path, label: str, count: int) -> None:
    path = folder / kind.file
    valid = path.read_bytes()
    kind.load(path)
    around = {p for p in folder.parent.rglob("*")}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for data in mutants(valid, count, label, None if kind.header is None else kind.header(valid)):
        path.write_bytes(data)
        try:
            kind.load(path)
        except (MmquantError, OSError) as error:
            check_line(error, path.name.split(".")[0])
        except BaseException as error:
            raise AssertionError(f"{label}: {type(error).__name__} by {data[:300]!r}") from error
    assert {p for p in folder.parent.rglob("*")} == around
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY


@pytest.mark.parametrize("label", KINDS)
def test_damaged_files_are_one_line(whole: Path, tmp_path: Path, label: str) -> None:
    shutil.copytree(whole, tmp_path / "box" / "model")
    fuzz(KINDS[label], tmp_path / "box" / "model", label, QUICK // KINDS[label].share)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("label", KINDS)
def test_a_hundred_thousand_damaged_files_are_one_line(whole: Path, tmp_path: Path, label: str) -> None:
    shutil.copytree(whole, tmp_path / "box" / "model")
    fuzz(KINDS[label], tmp_path / "box" / "model", f"long {label}", LONG)
