"""Train the demo model from scratch for a fixed time and save it in the FP8 layout of the MiniMax-M2.7 release.

    python train.py TEXT OUT [--seconds 400] [--batch 128]

TEXT is what make_corpus.py wrote. One GPU; the released weights are 9818 steps in 400 s on an H200.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from model import Layer, Model, Shape
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

MIXTURE = {"prose": 0.12, "code": 0.40, "docs": 0.38, "zh": 0.10}
SEPARATOR = "[e~["  # ends every document
LEARNING_RATE, WARM_UP, WEIGHT_DECAY = 2e-3, 200, 0.1
TILE = 128
SHARD_BYTES = 15_500_000
EVALUATION_CHARACTERS, EVALUATION_WINDOWS = 400_000, 40


def encode(tokenizer: Tokenizer, documents: list[str]) -> Tensor:
    """All documents as one int32 sequence of token ids, each followed by the separator."""
    separator = tokenizer.encode(SEPARATOR).ids
    ids: list[int] = []
    for encoded in tokenizer.encode_batch(documents, add_special_tokens=False):
        ids += encoded.ids + separator
    return torch.tensor(ids, dtype=torch.int32)


def draw(domains: list[Tensor], odds: Tensor, batch: int, context: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets [batch, context], each row from a domain drawn by `odds`, at a random place."""
    rows = []
    for ids, count in zip(
        domains, torch.multinomial(odds, batch, True).bincount(minlength=len(domains)).tolist(), strict=True
    ):
        start = torch.randint(0, len(ids) - context - 1, (count,), device=ids.device)
        rows.append(ids[start[:, None] + torch.arange(context + 1, device=ids.device)])
    window = torch.cat(rows).long()
    return window[:, :-1], window[:, 1:]


def optimizer(model: Model) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=parameters[0].is_cuda)


def learning_rate(step: int, progress: float) -> float:
    """Linear warm-up, then a cosine over the time that was given, down to 2 %."""
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return LEARNING_RATE * min((step + 1) / WARM_UP, 1) * (0.02 + 0.98 * cosine)


def train(model: Model, domains: list[Tensor], odds: Tensor, batch: int, seconds: float) -> int:
    """Steps taken in `seconds`, counted from the sixth step, when everything is compiled."""
    compiled = torch.compile(model) if model.embed.is_cuda else model
    adam, start, step = optimizer(model), time.time(), 0
    while (progress := (time.time() - start) / seconds) < 1:
        for group in adam.param_groups:
            group["lr"] = learning_rate(step, progress)
        inputs, targets = draw(domains, odds, batch, model.shape.context)
        loss = F.cross_entropy(compiled(inputs).float().flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        for layer in model.layers:
            assert isinstance(layer, Layer)
            layer.balance()
        if step == 5:
            start = time.time()
        if step % 500 == 0:
            print(step, f"{time.time() - start:.0f} s", f"loss {loss.item():.4f}", flush=True)
        step += 1
    return step


@torch.no_grad()
def perplexity(model: Model, ids: Tensor) -> float:
    """Over consecutive windows of the context, every position scored."""
    context, count = model.shape.context, (len(ids) - 1) // model.shape.context
    inputs = ids[: count * context].view(count, context).long()
    targets = ids[1 : count * context + 1].view(count, context).long()
    loss = 0.0
    for start in range(0, count, 8):
        logits = model(inputs[start : start + 8]).float().flatten(0, 1)
        loss += F.cross_entropy(logits, targets[start : start + 8].flatten(), reduction="sum").item()
    return math.exp(loss / (count * context))


def to_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 codes [O, I] and float32 scales [ceil(O/128), ceil(I/128)]; a tile's largest magnitude becomes 448."""
    rows, cols = weight.shape
    padded = F.pad(weight.detach().float(), (0, -cols % TILE, 0, -rows % TILE))
    tiles = padded.view(padded.shape[0] // TILE, TILE, padded.shape[1] // TILE, TILE)
    scale = tiles.abs().amax((1, 3)).clamp(min=1e-12) / 448
    codes = (tiles / scale[:, None, :, None]).to(torch.float8_e4m3fn).view_as(padded)
    return codes[:rows, :cols].contiguous(), scale


def layer_tensors(layer: Layer, prefix: str) -> dict[str, Tensor]:
    """One layer under the release's names: norms bf16, router float32, matrices FP8 with their scales."""
    norms = {"input_layernorm": layer.input_norm, "post_attention_layernorm": layer.post_norm}
    norms |= {"self_attn.q_norm": layer.q_norm, "self_attn.k_norm": layer.k_norm}
    tensors = {f"{prefix}{name}.weight": norm.detach().bfloat16() for name, norm in norms.items()}
    matrices = {f"self_attn.{p}_proj": getattr(layer, p) for p in "qkvo"}
    for expert in range(layer.shape.experts):
        for projection in ("w1", "w2", "w3"):
            matrices[f"block_sparse_moe.experts.{expert}.{projection}"] = getattr(layer, projection)[expert]
    for name, weight in matrices.items():
        codes, scale = to_fp8(weight)
        tensors |= {f"{prefix}{name}.weight": codes, f"{prefix}{name}.weight_scale_inv": scale}
    tensors[prefix + "block_sparse_moe.gate.weight"] = layer.gate.detach().float()
    tensors[prefix + "block_sparse_moe.e_score_correction_bias"] = layer.bias.float()
    return tensors


def save(model: Model, out: Path) -> None:
    """Sharded safetensors; assemble.py adds the index and the configuration."""
    tensors = {
        "model.embed_tokens.weight": model.embed.detach().bfloat16(),
        "lm_head.weight": model.head.detach().bfloat16(),
        "model.norm.weight": model.norm.detach().bfloat16(),
    }
    for number, layer in enumerate(model.layers):
        assert isinstance(layer, Layer)
        tensors |= layer_tensors(layer, f"model.layers.{number}.")
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if filled + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor.cpu().contiguous()
        filled += tensor.nbytes
    for number, shard in enumerate(shards, 1):
        save_file(shard, out / f"model-{number:05d}-of-{len(shards):05d}.safetensors", metadata={"format": "pt"})


def main(text: Path, out: Path, seconds: float, batch: int) -> None:
    torch.manual_seed(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = Tokenizer.from_file(str(text / "tokenizer.json"))
    documents: dict[str, list[str]] = json.loads(lzma.open(text / "train.json.xz").read())
    domains = [encode(tokenizer, texts).to(device) for texts in documents.values()]
    model = Model(Shape()).to(device)
    steps = train(model, domains, torch.tensor([MIXTURE[name] for name in documents]), batch, seconds)
    model.eval()
    result: dict[str, float] = {}
    for domain in documents:
        held_out = (text / f"eval_{domain}.txt").read_text(encoding="utf-8")[:EVALUATION_CHARACTERS]
        ids = encode(tokenizer, [held_out])[: model.shape.context * EVALUATION_WINDOWS].to(device)
        result[domain] = perplexity(model, ids)
    out.mkdir(parents=True, exist_ok=True)
    save(model, out)
    (out / "training.json").write_text(json.dumps({"steps": steps, "ppl": result, "seconds": seconds}))
    print(steps, "steps", result)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the demo model from scratch.")
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=400)
    parser.add_argument("--batch", type=int, default=128)
    options = parser.parse_args()
    main(options.text, options.out, options.seconds, options.batch)
