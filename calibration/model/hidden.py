"""The residual stream of all windows between layers, in RAM or in a memory-mapped file; saved for a continued run."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmquant.errors import InputError
from mmquant.stages import stage

from ...convert.checkpoints.batches import to_host
from ...convert.checkpoints.write import Entry, write_tensors
from ...convert.files.atomic import whole_file
from ...convert.files.progress import damaged

RAM_LIMIT = 8 << 30
WINDOWS = 8  # saved and loaded at a time
SAVED_DTYPES = {torch.float32: "F32", torch.float64: "F64"}


def place_of(device: torch.device | str, size: int) -> torch.device:
    """Where hidden states of `size` bytes are kept: on a CUDA device up to a fifth of its free memory."""
    device = torch.device(device)
    if device.type == "cuda" and 5 * size <= torch.cuda.mem_get_info(device)[0]:
        return device
    return torch.device("cpu")


def leaving(model: str, layer: int) -> str:
    """What messages call the hidden states that leave a layer."""
    return f"{model}: hidden states after layer {layer}"


def check_activations(values: Tensor, where: str, start: int = 0) -> None:
    """InputError unless hidden states [n, T, H] are finite; `start`: the number of the first window."""
    if bool(torch.isfinite(values).all()):
        return
    window, position, _ = (~torch.isfinite(values)).nonzero()[0].tolist()
    place = f"window {start + window}, position {position}"
    raise InputError(f"{where} hold NaN or infinity, first in {place}; expected finite hidden states")


class HiddenStates:
    """W windows x T positions x H channels of float32; batches are read, advanced by a layer and put back.

    device: where they lie (`place_of`); ram_limit is the CPU's.
    """

    def __init__(
        self,
        windows: int,
        length: int,
        hidden: int,
        ram_limit: int = RAM_LIMIT,
        folder: Path | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.shape = (windows, length, hidden)
        self.bytes = 4 * windows * length * hidden
        self._file = None
        if self.bytes <= ram_limit or torch.device(device).type != "cpu":
            self._values = torch.empty(self.shape, dtype=torch.float32, device=device)
            return
        # The file is unlinked with its handle: a killed process leaves nothing behind.
        self._file = tempfile.TemporaryFile(dir=folder, prefix="mmquant-hidden-")
        self._file.truncate(self.bytes)
        self._values = torch.from_numpy(np.memmap(self._file, dtype=np.float32, mode="r+", shape=self.shape))

    @property
    def on_disk(self) -> bool:
        """Whether they lie in a file instead of memory."""
        return self._file is not None

    def batches(self, windows: int, device: torch.device | str = "cpu") -> Iterator[tuple[int, Tensor]]:
        """(first window, values [<= windows, T, H] on the device); the values are a copy."""
        for start in range(0, self.shape[0], windows):
            part = self._values[start : start + windows]
            moved = part.to(device)
            yield start, moved.clone() if moved is part else moved

    def put(self, start: int, values: Tensor, where: str | None = None) -> None:
        """Store `values` [n, T, H] as windows start..start+n-1.

        where: whose values these are; with it, NaN or infinity raise InputError.
        """
        if where is not None:
            check_activations(values, where, start)
        self._values[start : start + values.shape[0]].copy_(values)

    def apart(self) -> HiddenStates | None:
        """A copy in host memory to be saved while these move on; None of states that lie there already."""
        if not self._values.is_cuda:
            return None
        copy = HiddenStates(0, *self.shape[1:])
        copy.shape, copy.bytes, copy._values = self.shape, self.bytes, to_host(self._values)
        return copy

    def all(self) -> Tensor:
        """The stored tensor itself [W, T, H]."""
        return self._values

    def save(self, path: Path) -> None:
        """Write the states to `path`, whole; see `save_states`."""
        save_states(path, {"hidden": self})

    def load(self, path: Path, remedy: str | None = None) -> None:
        """Take up what `save` wrote. InputError, naming the file and the remedy, when it is damaged or another's."""
        load_states(path, {"hidden": self}, remedy)


def save_states(path: Path, states: Mapping[str, HiddenStates], others: Mapping[str, Tensor] | None = None) -> None:
    """Write hidden states by name, and other tensors (float32 or float64), as one safetensors file.

    The file appears whole and durable, and carries the SHA-256 of its values. InputError when a value is not finite.
    """
    parts = [_states_entry(name, found) for name, found in states.items()]
    parts += [_tensor_entry(name, value) for name, value in sorted((others or {}).items())]
    with stage("streams"), whole_file(path) as file:
        write_tensors(file, parts, seal="sha256")


def load_states(
    path: Path,
    states: Mapping[str, HiddenStates],
    remedy: str | None = None,
    first: int = 0,
    windows: int | None = None,
) -> dict[str, Tensor]:
    """Fill `states` from what `save_states` wrote under their names; the other tensors by name.

    first, windows: the file's first window is that of the states, and how many it has (None: as many as they); those
    outside of the states are left out.

    InputError, naming the file, when it cannot be read, holds other states or fails its SHA-256. remedy: what starts
    over (convert/files/progress.py).
    """
    try:
        return _load(path, states, remedy, first, windows)
    except (SafetensorError, OSError) as error:
        raise damaged(path, f"not readable ({error})", "the hidden states of an unfinished run", remedy) from None


def _load(
    path: Path, states: Mapping[str, HiddenStates], remedy: str | None, first: int, windows: int | None
) -> dict[str, Tensor]:
    digest, others = hashlib.sha256(), dict[str, Tensor]()
    with safe_open(path, framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        for name, state in states.items():
            shape = (state.shape[0] if windows is None else windows, *state.shape[1:])
            if shapes.get(name) != shape:
                raise damaged(path, f"{name} of shape {shapes.get(name)}", f"{shape}", remedy)
            values = file.get_slice(name)
            for start in range(0, shape[0], WINDOWS):
                part = values[start : start + WINDOWS]
                digest.update(_bytes(part))
                place = first + start
                part = part[max(0, -place) : max(0, state.shape[0] - place)]
                if len(part):
                    state.put(max(0, place), part)
        for name in sorted(name for name in shapes if name not in states):
            others[name] = file.get_tensor(name)
            digest.update(_bytes(others[name]))
        known = (file.metadata() or {}).get("sha256")
    if digest.hexdigest() != known:
        raise damaged(path, f"SHA-256 {digest.hexdigest()[:16]}", f"{str(known)[:16]} as it was written", remedy)
    return others


def _states_entry(name: str, states: HiddenStates) -> Entry:
    return Entry(name, "F32", states.shape, lambda: (values for _, values in states.batches(WINDOWS)))


def _tensor_entry(name: str, value: Tensor) -> Entry:
    return Entry(name, SAVED_DTYPES[value.dtype], tuple(value.shape), lambda: iter([value]))


def _bytes(value: Tensor) -> memoryview:
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
