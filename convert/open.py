"""From what a user types after --model to a Source."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from .checkpoints.checkpoint import Checkpoint, open_checkpoint, read_config
from .checkpoints.store import LocalFolder, ShardStore
from .source import Source

if TYPE_CHECKING:
    from .hub.store import FetchOptions

DEMO = "demo"


def demo_folder() -> Path:
    """The demo checkpoint inside the installed package."""
    return Path(str(resources.files("mmquant").joinpath("data", "demo")))


def open_source(spec: str | Path, fetch: FetchOptions | None = None) -> Source:
    """Open a folder (native FP8, BF16, quantized), a GGUF file, `demo`, `hf:ORG/NAME[@REV]` or `ms:ORG/NAME[@REV]`.

    Raises ValueError when it is none of these or not a MiniMax-M2 model.
    """
    path = Path(spec)
    if str(spec) == DEMO:
        return open_native(spec)
    if str(spec).startswith(("hf:", "ms:")):
        from .hub.store import hub_source

        return open_store(hub_source(str(spec), fetch))
    if path.suffix == ".gguf" or (path.is_dir() and not (path / "config.json").exists() and any(path.glob("*.gguf"))):
        from .gguf.reader import GgufSource

        return GgufSource(path)
    return open_store(LocalFolder(path))


def open_store(store: ShardStore) -> Source:
    """A folder's or repository's safetensors: native FP8 and BF16, or what other tools quantized."""
    quantization = read_config(store).get("quantization_config") or {}
    if quantization.get("quant_method") in (None, "fp8"):
        return Checkpoint(store)
    from .checkpoints.quantized_folder import QuantizedFolder

    return QuantizedFolder(store)


def open_native(spec: str | Path, fetch: FetchOptions | None = None) -> Checkpoint:
    """Open a checkpoint that can be quantized: native FP8 or plain BF16, in a folder or on a hub (then by `fetch`)."""
    if str(spec) == DEMO:
        return Checkpoint(LocalFolder(demo_folder(), DEMO))
    if str(spec).startswith(("hf:", "ms:")):
        from .hub.store import hub_source

        return Checkpoint(hub_source(str(spec), fetch))
    return open_checkpoint(Path(spec))
