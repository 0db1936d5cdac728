"""Train the development model from scratch for a fixed time, in the release's layout.

    python train_model.py TEXT OUT [--seconds 390] [--batch 128]

TEXT is what pack.py wrote. One GPU. The architecture, the schedule and the FP8 layout are docs/demo-model's.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "docs" / "demo-model"))
import assemble
import train as demo
from model import Model, Shape
from tokenizers import Tokenizer

SHAPE = Shape(hidden=512, width=256, layers=8, experts=32, chosen=4, heads=8, kv_heads=2, head_dim=64, vocab=4096)
MIXTURE = {"code": 0.20, "docs": 0.16, "prose": 0.24, "zh": 0.11, "math": 0.12, "lang": 0.12, "chat": 0.05}
LEARNING_RATE = 1.2e-3
HELD_OUT_WINDOWS = 100


def main(text: Path, out: Path, seconds: float, batch: int, shape: Shape) -> None:
    torch.manual_seed(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    demo.LEARNING_RATE = LEARNING_RATE
    tokenizer = Tokenizer.from_file(str(text / "tokenizer.json"))
    with np.load(text / "train.npz") as packed:
        domains = {name: torch.from_numpy(packed[name].astype(np.int32)).to(device) for name in packed.files}
    model = Model(shape).to(device)
    odds = torch.tensor([MIXTURE[name] for name in domains])
    steps = demo.train(model, list(domains.values()), odds, batch, seconds)
    model.eval()
    result: dict[str, float] = {}
    for domain in domains:
        ids = demo.encode(tokenizer, [(text / f"evaluation_{domain}.txt").read_text(encoding="utf-8")])
        result[domain] = demo.perplexity(model, ids[: shape.context * HELD_OUT_WINDOWS + 1].to(device))
    print(steps, "steps", result, flush=True)
    trained = out / "trained"
    trained.mkdir(parents=True, exist_ok=True)
    demo.save(model, trained)
    (trained / "training.json").write_text(json.dumps({"steps": steps, "ppl": result, "seconds": seconds}))
    assemble.main(trained, text / "tokenizer.json", out / "model", shape)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the development model from scratch.")
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=390)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--tiny", action="store_true", help="two narrow layers, to try the script")
    options = parser.parse_args()
    tiny = Shape(hidden=256, width=256, layers=2, experts=8, vocab=SHAPE.vocab)
    main(options.text, options.out, options.seconds, options.batch, tiny if options.tiny else SHAPE)
