"""What a real vLLM computes from each artifact, against mmquant's own float32 forward of the same folder.

    python bench/vllm_agree.py [--work DIR] [--windows 16] [NAME ...]

Writes the demo model as each NAME (default: all of FOLDERS; a folder of --work that is complete is taken as it is),
opens it in vLLM (eager) and takes the whole logits of windows of the bundled evaluation text. KL(ours || vLLM) is in
nats a token; `ours bf16` bounds what can be seen: our own forward in bfloat16 against float32. The last two columns
are the distance to the original model: by exact weights, and by vLLM. Needs a CUDA device and vLLM.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import _path  # noqa: F401
import torch
from torch import Tensor

from mmquant.calibration.evaluate.metrics import log_softmax
from mmquant.calibration.model.forward import embed, final_logits, layer_forward
from mmquant.calibration.text.corpus import bundled
from mmquant.calibration.text.tokenizer import load_tokenizer, windows
from mmquant.convert.open import open_source
from mmquant.convert.source import Source, read_globals, read_layer

CONTEXT = 512
TEXTS = ("prose", "docs", "zh", "code")
FOLDERS = {
    "fp8-block": "fp8",
    "fp8-channel": "fp8 --scheme channel",
    "int4": "int4",
    "int4-fp8-cache": "int4 --kv-cache fp8",
    "nvfp4": "nvfp4",
    "nvfp4-high": "nvfp4 --effort high",
    "nvfp4-modelopt": "nvfp4 --format modelopt",
    "nvfp4-attention": "nvfp4 --attention nvfp4",
    "nvfp4-w4a4": "nvfp4 --activations nvfp4",
    "mxfp4": "mxfp4",
}


@torch.inference_mode()
def own_logits(source: Source, tokens: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits [W, T, V] in float32 of tokens [W, T], computed on the device in `dtype`."""
    device = tokens.device
    outside = read_globals(source, device, dtype)
    hidden = embed(outside, tokens)
    for layer in range(source.geometry.layers):
        hidden = layer_forward(read_layer(source, layer, device, dtype), source.geometry, hidden)
    return final_logits(outside, source.geometry, hidden).float()


def vllm_logits(folder: Path, tokens: Tensor, backend: str | None) -> Tensor:
    """Logits [W, T, V] by vLLM: those that it computes for the prompt's log-probabilities, caught on the way."""
    import vllm  # pyright: ignore[reportMissingImports]

    model = vllm.LLM(
        model=str(folder),
        max_model_len=CONTEXT + 1,
        enforce_eager=True,
        attention_backend=backend,
        gpu_memory_utilization=0.1,  # several of these may share the card
        kv_cache_memory_bytes=2**30,
        trust_remote_code=False,
        enable_prefix_caching=False,
        max_num_batched_tokens=8 * CONTEXT,
    )
    caught: list[Tensor] = []

    def watch(inner: torch.nn.Module) -> None:
        compute: Callable[..., Tensor] = vars(type(inner))["compute_logits"].__get__(inner)

        def keep(hidden: Tensor, *rest: object, **named: object) -> Tensor:
            logits = compute(hidden, *rest, **named)
            if len(logits) == CONTEXT - 1:
                caught.append(logits.float())
            return logits

        inner.__dict__["compute_logits"] = keep

    model.apply_model(watch)
    settings = vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1, detokenize=False)
    for window in tokens.tolist():
        model.generate([{"prompt_token_ids": window}], settings, use_tqdm=False)
    found = torch.stack(caught)
    del model, watch
    gc.collect()
    torch.cuda.empty_cache()
    return found


def write(name: str, folder: Path) -> None:
    """The demo model as variant `name` in `folder`, which keeps what a run before this one completed."""
    if (folder / "mmquant.fit.json").exists():
        return
    command = [sys.executable, "-m", "mmquant", *FOLDERS[name].split(), "--model", "demo", "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])


def distance(reference: Tensor, logits: Tensor) -> float:
    """Mean KL(reference || logits) in nats over all rows."""
    p, q = log_softmax(reference), log_softmax(logits)
    return float((p.exp() * (p - q)).sum(-1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(FOLDERS), metavar="NAME")
    parser.add_argument("--work", type=Path, default=Path("vllm-agree"))
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--attention-backend", help="of vLLM, for example TRITON_ATTN")
    given = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process, where its logits can be seen
    tokenizer = load_tokenizer(open_source("demo"))
    each = given.windows // len(TEXTS)
    texts = [(bundled("evaluation") / f"{name}.txt").read_text() for name in TEXTS]
    tokens = torch.cat([windows(text, tokenizer, CONTEXT, each) for text in texts]).cuda()
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}, {len(tokens)} windows of {CONTEXT}", flush=True)
    original = own_logits(open_source("demo"), tokens)[:, :-1]
    print("| folder | KL(ours, vLLM) | ours bf16 | original, ours | original, vLLM | seconds |", flush=True)
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    for name in given.names:
        folder, started = given.work / name, time.monotonic()
        try:
            write(name, folder)
            source = open_source(str(folder))
            ours = own_logits(source, tokens)[:, :-1]
            half = own_logits(source, tokens, torch.bfloat16)[:, :-1]
            theirs = vllm_logits(folder, tokens, given.attention_backend)
            pairs = (ours, theirs), (ours, half), (original, ours), (original, theirs)
            numbers = " | ".join(f"{distance(*pair):.4f}" for pair in pairs)
        except Exception as error:  # one folder that does not load must not hide the others
            traceback.print_exc()
            numbers = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]} | | | |"
        print(f"| {name} | {numbers} | {time.monotonic() - started:.0f} |", flush=True)


if __name__ == "__main__":
    main()
