"""Open the model named by `--model`."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from mmquant.errors import InputError, naming

from .checkpoints.checkpoint import Checkpoint, open_checkpoint
from .checkpoints.quantization_config import SchemeBook, quantization_of
from .checkpoints.store import LocalFolder, ShardStore
from .checkpoints.tensors import read_config
from .files.parse import is_list
from .hub.address import Address, parse_address
from .hub.hubs import DEFAULT_HUB
from .models import architecture_of
from .source import Source

if TYPE_CHECKING:
    from .checkpoints.quantized_folder import QuantizedFolder
    from .hub.store import FetchOptions

DEMO = "demo"


def demo_folder() -> Path:
    """The demo checkpoint inside the installed package."""
    return Path(str(resources.files("mmquant").joinpath("data", "demo")))


def open_source(spec: str | Path, fetch: FetchOptions | None = None) -> Source:
    """Open a folder (FP8, BF16, quantized), a GGUF file, `demo`, or a hub's repository.

    A repository is hf:ORG/NAME[@REV], ms:... or its address: safetensors, or of a GGUF repository the type that :TYPE
    names. Raises InputError when it is none of these or not a MiniMax-M2 model.
    """
    if str(spec) == DEMO:
        return open_native(spec)
    address = parse_address(str(spec))
    if address.spec is not None:
        return _open_repository(address, fetch)
    path = Path(spec)
    if is_gguf(path):
        from .gguf.reader import GgufSource

        return GgufSource(path)
    return open_store(LocalFolder(path))


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file, or a folder of them without a config.json."""
    if path.is_dir():
        return not (path / "config.json").exists() and any(path.glob("*.gguf"))
    return path.suffix == ".gguf"


def _open_repository(address: Address, fetch: FetchOptions | None) -> Source:
    from .hub.gguf_stream import stream_gguf_repository
    from .hub.store import hub_source

    assert address.spec is not None
    if address.kind is not None:
        return stream_gguf_repository(address.spec, address.kind, fetch)
    store = hub_source(address.spec, fetch)
    if "config.json" not in store.files() and any(name.endswith(".gguf") for name in store.files()):
        store.close()
        return stream_gguf_repository(address.spec, None, fetch)
    return open_store(store)


def open_store(store: ShardStore) -> Checkpoint | QuantizedFolder:
    """A folder's or repository's safetensors: FP8 and BF16 that can be quantized, or what is quantized already."""
    config = read_config(store)
    with naming(store.label):
        quantization = quantization_of(config)
        is_source = quantization is None or SchemeBook(quantization, architecture_of(config).names).is_source
    if is_source:
        return Checkpoint(store)
    from .checkpoints.quantized_folder import QuantizedFolder

    return QuantizedFolder(store)


def open_native(spec: str | Path, fetch: FetchOptions | None = None) -> Checkpoint:
    """Open a checkpoint that can be quantized: FP8 or BF16, in a folder or on a hub (then by `fetch`).

    Raises InputError for GGUF, and for what is quantized to integers.
    """
    if str(spec) == DEMO:
        return Checkpoint(LocalFolder(demo_folder(), DEMO))
    address = parse_address(str(spec))
    if address.spec is None:
        if is_gguf(Path(spec)):
            raise InputError(f"{spec}: GGUF, expected safetensors in FP8 or BF16: quantize the original instead")
        return open_checkpoint(Path(spec))
    from .hub.store import hub_source

    if address.kind is not None:
        raise InputError(f"{spec}: a GGUF type, expected safetensors in FP8 or BF16: quantize the original instead")
    store = hub_source(address.spec, fetch)
    if "config.json" not in store.files() and any(name.endswith(".gguf") for name in store.files()):
        store.close()
        raise InputError(f"{store.label}: a GGUF repository{_base_of(store)}")
    return Checkpoint(store)


def _base_of(store: ShardStore) -> str:
    """What to quantize instead of a GGUF repository: the base model that its card names."""
    from .gguf.metadata import card_fields

    base = card_fields(store.small("README.md")).get("base_model")
    first = base[0] if is_list(base) and base else base
    original = f"{DEFAULT_HUB.key}:{first}" if isinstance(first, str) else "the original"
    return f", expected safetensors in FP8 or BF16: quantize {original} instead (eval reads hf:ORG/NAME:TYPE)"
