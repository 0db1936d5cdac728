"""File names and folders that clients of a repository find: llama.cpp -hf, Ollama, LM Studio, vLLM."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

from mmquant.errors import InputError

PART_LIMIT = 48 * 10**9  # bytes: below what plain HTTP downloads of huggingface_hub accept (50e9)
LISTED = 1000  # entries of one page of a file list; llama.cpp reads no second one
IMATRIX = "imatrix.gguf"
NOT_MODELS = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")  # llama.cpp: never taken for a model
LABEL = re.compile(r"-((?:UD-)?(?:I?Q\d\w*|TQ\d_\d|MXFP4\w*|BF16|F16|F32))$", re.IGNORECASE)
SPLIT = re.compile(r"-(\d{5})-of-(\d{5})$")


def split_of(path: str) -> tuple[str, int, int]:
    """(stem without the part's number, part, parts); (stem, 1, 1) for a single file."""
    stem = PurePosixPath(path).name.removesuffix(".gguf")
    match = SPLIT.search(stem)
    return (stem[: match.start()], int(match[1]), int(match[2])) if match else (stem, 1, 1)


def quant_label(path: str, known: Iterable[str] = ()) -> str:
    """The quantization that a GGUF name ends with (`known` ones besides llama.cpp's); ValueError when there is none."""
    stem = split_of(path)[0]
    for label in sorted(known, key=len, reverse=True):
        if stem.lower().endswith("-" + label.lower()):
            return label
    match = LABEL.search(stem)
    if not match:
        raise InputError(f"{path}: the name ends with no quantization, expected one such as NAME-Q4_K_M.gguf")
    return match[1]


def is_model(path: str) -> bool:
    """Whether a path is a GGUF model."""
    return path.endswith(".gguf") and path != IMATRIX


def remote_path(path: str, known: Iterable[str] = ()) -> str:
    """Where a file goes: GGUF models of the root into a folder of their quantization, all else where it is."""
    return f"{quant_label(path, known)}/{path}" if is_model(path) and "/" not in path else path


def find_by_tag(paths: Iterable[str], tag: str) -> str | None:
    """The file that `llama-server -hf REPO:TAG` takes: the first path, in order, with TAG and then `.` or `-` in it."""
    pattern = re.compile(re.escape(tag) + "[.-]", re.IGNORECASE)
    for path in sorted(paths):
        name = PurePosixPath(path).name
        if path.endswith(".gguf") and not any(word in name for word in NOT_MODELS) and pattern.search(path):
            return path if split_of(path)[1] == 1 else None
    return None


def check_layout(files: Mapping[str, int], known: Iterable[str] = ()) -> None:
    """Refuse names, in the repository's paths, that some client would not find or find wrongly. Raises ValueError."""
    if "preset.ini" in files:
        raise InputError("preset.ini: in a repository's root llama.cpp fetches nothing but it; keep presets elsewhere")
    for path, size in files.items():
        if size > PART_LIMIT:
            raise InputError(f"{path}: {size:,} bytes, expected parts of at most {PART_LIMIT:,} (--max-part-size)")
    models = [p for p in files if is_model(p)]
    if models and len(files) >= LISTED:
        raise InputError(f"{len(files)} files: llama.cpp reads a list of {LISTED} entries at most")
    for path in models:
        _check_model(path, files, known)
    for path in models:
        label, part = quant_label(path, known), split_of(path)[1]
        found = find_by_tag(models, label)
        if part == 1 and found != path:
            raise InputError(f"{path}: `-hf REPO:{label}` finds {found} instead, expected one file set a quantization")


def _check_model(path: str, files: Mapping[str, int], known: Iterable[str]) -> None:
    name, folder = PurePosixPath(path).name, str(PurePosixPath(path).parent)
    if word := next((w for w in NOT_MODELS if w in name), None):
        raise InputError(f"{path}: llama.cpp ignores model files with {word!r} in their names")
    label = quant_label(path, known)
    if folder.rsplit("/", 1)[-1] != label:
        raise InputError(f"{path}: in folder {folder}, expected a folder {label} named like the file's quantization")
    stem, _, parts = split_of(path)
    if parts > 1:
        expected = [f"{folder}/{stem}-{i:05d}-of-{parts:05d}.gguf" for i in range(1, parts + 1)]
        if missing := [w for w in expected if w not in files]:
            raise InputError(f"{path}: part {missing[0]} is missing, expected {parts}")
