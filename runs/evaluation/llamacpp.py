"""Call llama.cpp through its C API (extra `llamacpp`): tokens, logits, text, ggml's quantizer.

The wheel (xllamacpp) carries one shared library with llama.cpp linked in; ctypes opens it without importing the module.
Only the leading fields of the parameter structs are named here; a struct larger than the library's is safe to return
into and to pass (by value, in memory), and `_checked` compares the defaults with this layout's at the start.
Source of the layouts: include/llama.h of llama.cpp 0.6.0-dev.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from mmquant.errors import InputError

_SPARE = 256  # bytes behind the named fields; the library's structs are 80 and 168 bytes
_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_silence = _LOG(lambda level, text, user: None)


class _ModelParams(ctypes.Structure):
    _fields_ = [
        ("devices", ctypes.c_void_p),
        ("tensor_buft_overrides", ctypes.c_void_p),
        ("n_gpu_layers", ctypes.c_int32),
        ("split_mode", ctypes.c_int32),
        ("load_mode", ctypes.c_int32),
        ("lazy_mode", ctypes.c_int32),
        ("main_gpu", ctypes.c_int32),
        ("tensor_split", ctypes.c_void_p),
        ("progress_callback", ctypes.c_void_p),
        ("progress_callback_user_data", ctypes.c_void_p),
        ("kv_overrides", ctypes.c_void_p),
        ("vocab_only", ctypes.c_bool),
        ("check_tensors", ctypes.c_bool),
        ("use_extra_bufts", ctypes.c_bool),
        ("no_host", ctypes.c_bool),
        ("no_alloc", ctypes.c_bool),
        ("load_mtp", ctypes.c_bool),
        ("spare", ctypes.c_ubyte * _SPARE),
    ]


class _ContextParams(ctypes.Structure):
    _fields_ = [
        ("n_ctx", ctypes.c_uint32),
        ("n_batch", ctypes.c_uint32),
        ("n_ubatch", ctypes.c_uint32),
        ("n_seq_max", ctypes.c_uint32),
        ("n_rs_seq", ctypes.c_uint32),
        ("n_outputs_max", ctypes.c_uint32),
        ("n_outputs_max_per_seq", ctypes.c_uint32),
        ("n_threads", ctypes.c_int32),
        ("n_threads_batch", ctypes.c_int32),
        ("ctx_type", ctypes.c_int32),
        ("rope_scaling_type", ctypes.c_int32),
        ("pooling_type", ctypes.c_int32),
        ("attention_type", ctypes.c_int32),
        ("flash_attn_type", ctypes.c_int32),
        ("rope_freq_base", ctypes.c_float),
        ("rope_freq_scale", ctypes.c_float),
        ("yarn", ctypes.c_float * 4),
        ("yarn_orig_ctx", ctypes.c_uint32),
        ("defrag_thold", ctypes.c_float),
        ("cb_eval", ctypes.c_void_p),
        ("cb_eval_user_data", ctypes.c_void_p),
        ("type_k", ctypes.c_int32),
        ("type_v", ctypes.c_int32),
        ("spare", ctypes.c_ubyte * _SPARE),
    ]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


_POINTER = ctypes.c_void_p
_INT = ctypes.c_int32
_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [_LOG, _POINTER]),
    "llama_version": (ctypes.c_char_p, []),
    "llama_model_default_params": (_ModelParams, []),
    "llama_context_default_params": (_ContextParams, []),
    "llama_model_load_from_file": (_POINTER, [ctypes.c_char_p, _ModelParams]),
    "llama_model_free": (None, [_POINTER]),
    "llama_model_get_vocab": (_POINTER, [_POINTER]),
    "llama_model_size": (ctypes.c_uint64, [_POINTER]),
    "llama_vocab_n_tokens": (_INT, [_POINTER]),
    "llama_vocab_is_eog": (ctypes.c_bool, [_POINTER, _INT]),
    "llama_vocab_get_add_bos": (ctypes.c_bool, [_POINTER]),
    "llama_init_from_model": (_POINTER, [_POINTER, _ContextParams]),
    "llama_free": (None, [_POINTER]),
    "llama_get_memory": (_POINTER, [_POINTER]),
    "llama_memory_clear": (None, [_POINTER, ctypes.c_bool]),
    "llama_batch_init": (_Batch, [_INT, _INT, _INT]),
    "llama_batch_free": (None, [_Batch]),
    "llama_decode": (_INT, [_POINTER, _Batch]),
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), [_POINTER]),
    "llama_tokenize": (_INT, [_POINTER, ctypes.c_char_p, _INT, _POINTER, _INT, ctypes.c_bool, ctypes.c_bool]),
    "llama_detokenize": (_INT, [_POINTER, _POINTER, _INT, ctypes.c_char_p, _INT, ctypes.c_bool, ctypes.c_bool]),
    "ggml_quantize_init": (None, [_INT]),
    "ggml_quantize_chunk": (
        ctypes.c_size_t,
        [_INT, _POINTER, _POINTER, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, _POINTER],
    ),
    "ggml_row_size": (ctypes.c_size_t, [_INT, ctypes.c_int64]),
    "ggml_quantize_requires_imatrix": (ctypes.c_bool, [_INT]),
}


def available() -> bool:
    """Whether the extra's wheel is installed."""
    return importlib.util.find_spec("xllamacpp") is not None


@lru_cache(maxsize=1)
def load_library() -> ctypes.CDLL:
    """The shared library, its functions declared and its log silenced.

    Raises ValueError when the wheel is missing or its structs are not those of this module.
    """
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        raise InputError("llama.cpp: the package xllamacpp is not installed; pip install 'mmquant[llamacpp]'")
    files = sorted(p for p in Path(spec.origin).parent.glob("xllamacpp*") if p.suffix in (".so", ".dylib", ".pyd"))
    if not files:
        raise InputError(f"llama.cpp: {Path(spec.origin).parent} holds no shared library, expected xllamacpp.abi3.so")
    loaded = ctypes.CDLL(str(files[0]))
    for name, (result, arguments) in _SIGNATURES.items():
        try:
            function = getattr(loaded, name)
        except AttributeError:
            raise InputError(
                f"llama.cpp: {files[0].name} has no function {name}; another version of xllamacpp"
            ) from None
        function.restype, function.argtypes = result, arguments
    _checked(loaded)
    loaded.llama_log_set(_silence, None)
    loaded.llama_backend_init()
    return loaded


def _checked(loaded: ctypes.CDLL) -> None:
    model, context = loaded.llama_model_default_params(), loaded.llama_context_default_params()
    found = (model.n_gpu_layers, model.split_mode, model.main_gpu, model.use_extra_bufts, model.vocab_only)
    found += (context.n_ctx, context.n_batch, context.n_ubatch, context.n_seq_max, context.flash_attn_type)
    found += (context.yarn[0], context.defrag_thold, context.type_k, context.type_v)
    expected = (-1, 1, 0, True, False, 512, 2048, 512, 1, -1, -1.0, -1.0, 1, 1)
    if found != expected:
        raise InputError(f"llama.cpp: default parameters {found}, expected {expected}: another version of xllamacpp")


def version() -> str:
    """llama.cpp's own version, such as "0.6.0-dev"."""
    return load_library().llama_version().decode()


class LlamaModel:
    """A GGUF file opened by llama.cpp on the CPU, with one context for windows of up to `context` tokens.

    `exact` keeps attention in float32 (by default llama.cpp runs its float16 flash attention); `cache`: ggml's number
    of the type of keys and values.

    Raises ValueError for a file that llama.cpp refuses. Use as a context manager: the memory is the library's.
    """

    def __init__(
        self,
        path: str | Path,
        context: int = 512,
        threads: int = 1,
        block: int = 512,
        exact: bool = False,
        cache: int | None = None,
    ) -> None:
        self._lib = load_library()
        self.path, self.context, self.block = Path(path), context, min(block, context)
        self._context = self._batch = None
        self._model = self._lib.llama_model_load_from_file(str(path).encode(), self._lib.llama_model_default_params())
        if not self._model:
            raise InputError(f"{path}: llama.cpp {version()} does not load this file, expected a GGUF model it knows")
        self._vocab = self._lib.llama_model_get_vocab(self._model)
        self.vocab = int(self._lib.llama_vocab_n_tokens(self._vocab))
        params = self._lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context, self.block, self.block
        params.n_outputs_max, params.n_outputs_max_per_seq = self.block, 0
        params.n_threads = params.n_threads_batch = threads
        if exact:
            params.type_k = params.type_v = params.flash_attn_type = 0
        if cache is not None:
            params.type_k = params.type_v = cache
            params.flash_attn_type = 1  # quantized values need it
        self._context = self._lib.llama_init_from_model(self._model, params)
        if not self._context:
            self.close()
            raise InputError(f"{path}: llama.cpp has no memory for a context of {context} tokens")
        self._batch = self._lib.llama_batch_init(self.block, 0, 1)

    def __enter__(self) -> LlamaModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the library's memory back; harmless when repeated."""
        if self._batch is not None:
            self._lib.llama_batch_free(self._batch)
        if self._context:
            self._lib.llama_free(self._context)
        if self._model:
            self._lib.llama_model_free(self._model)
        self._batch = self._context = self._model = None

    def tokenize(self, text: str, special: bool = True) -> list[int]:
        """Token ids of `text`, no BOS beyond what the file asks for; `special` recognises control tokens."""
        raw = text.encode()
        room = len(raw) + 16
        ids = (ctypes.c_int32 * room)()
        count = self._lib.llama_tokenize(self._vocab, raw, len(raw), ids, room, True, special)
        if count < 0:
            raise InputError(f"{self.path}: llama.cpp asks for {-count} tokens for {len(raw)} bytes of text")
        return list(ids[:count])

    def detokenize(self, tokens: Sequence[int], special: bool = False) -> str:
        """The text of `tokens`; `special` spells control tokens out."""
        ids = (ctypes.c_int32 * len(tokens))(*tokens)
        room = 64 * len(tokens) + 64
        text = ctypes.create_string_buffer(room)
        count = self._lib.llama_detokenize(self._vocab, ids, len(tokens), text, room, False, special)
        return text.raw[: max(count, 0)].decode(errors="replace")

    def logit_blocks(self, tokens: Sequence[int], first: int = 0) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Logits of one window from an empty cache: (position of the first row, [rows, V] float32), from `first` on.

        Raises ValueError for a window longer than the context or a token outside the vocabulary.
        """
        if len(tokens) > self.context:
            raise InputError(f"{self.path}: a window of {len(tokens)} tokens, expected at most {self.context}")
        if any(not 0 <= token < self.vocab for token in tokens):
            raise InputError(f"{self.path}: a token outside 0..{self.vocab - 1}, the vocabulary of this file")
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        for start in range(0, len(tokens), self.block):
            rows = self._decode(tokens[start : start + self.block], start, first)
            if len(rows):
                yield max(start, first), rows

    def _decode(self, tokens: Sequence[int], start: int, first: int) -> NDArray[np.float32]:
        batch = self._batch
        assert batch is not None
        batch.n_tokens = len(tokens)
        wanted = 0
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, start + i, 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = start + i >= first
            wanted += start + i >= first
        code = self._lib.llama_decode(self._context, batch)
        if code != 0:
            raise InputError(f"{self.path}: llama_decode returned {code} at position {start}, expected 0")
        if not wanted:
            return np.empty((0, self.vocab), np.float32)
        view = np.ctypeslib.as_array(self._lib.llama_get_logits(self._context), (wanted, self.vocab))
        return view.copy()

    def logits(self, tokens: Sequence[int], first: int = 0) -> NDArray[np.float32]:
        """Logits [T - first, V] float32 of one window, from an empty cache."""
        return np.concatenate([rows for _, rows in self.logit_blocks(tokens, first)])

    def generate(self, tokens: Sequence[int], count: int) -> list[int]:
        """The `count` most probable continuations of `tokens`, one after the other, ending early at an end token."""
        last = self.logits(tokens, len(tokens) - 1)[-1]
        out: list[int] = []
        while len(out) < count and len(tokens) + len(out) < self.context:
            out.append(int(last.argmax()))
            if self._lib.llama_vocab_is_eog(self._vocab, out[-1]):
                break
            last = self._decode(out[-1:], len(tokens) + len(out) - 1, 0)[-1]
        return out


def quantize(kind: int, rows: NDArray[np.float32], imatrix: NDArray[np.float32] | None = None) -> NDArray[np.uint8]:
    """ggml's own encoding of `rows` [R, C] float32 as ggml type `kind` (its number), weighted by `imatrix` [C] or not.

    Returns [R, bytes of a row] uint8. Raises ValueError for an importance of the wrong length.
    """
    lib = load_library()
    source = np.ascontiguousarray(rows, np.float32)
    weights = None if imatrix is None else np.ascontiguousarray(imatrix, np.float32)
    if weights is not None and weights.shape != (source.shape[1],):
        raise InputError(f"ggml quantizer: {weights.shape} importances for {source.shape[1]} columns")
    lib.ggml_quantize_init(kind)
    out = np.zeros((len(source), lib.ggml_row_size(kind, source.shape[1])), np.uint8)
    pointer = None if weights is None else weights.ctypes.data
    written = lib.ggml_quantize_chunk(
        kind, source.ctypes.data, out.ctypes.data, 0, len(source), source.shape[1], pointer
    )
    assert written == out.nbytes, (written, out.nbytes)
    return out
