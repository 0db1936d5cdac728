"""Split the collected text by document, train the tokenizer, and encode for train_model.py and the judge.

    python pack.py corpus.json OUT

writes OUT/tokenizer.json, OUT/train.npz (domain -> uint16 tokens) and OUT/{calibration,tuning,evaluation}_DOMAIN.txt.
The three held-out sides share no document with one another or with the training text.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "docs" / "demo-model"))
import make_corpus

VOCAB = 4096
SIDES = ("calibration", "tuning", "evaluation")
SHARE = 3  # percent of the documents, each side
LONGEST, CHARACTERS = 8_000, 800_000  # of a held-out document, of a side
SEPARATOR = "[e~["  # ends every document


def side_of(name: str) -> str:
    """By the document's name alone, so that the split never moves."""
    bucket = int(hashlib.md5(name.encode()).hexdigest(), 16) % 100
    return SIDES[bucket // SHARE] if bucket < SHARE * len(SIDES) else "training"


def main(corpus: Path, out: Path) -> None:
    random.seed(0)
    out.mkdir(parents=True, exist_ok=True)
    training: dict[str, list[str]] = {}
    for domain, documents in json.loads(corpus.read_text(encoding="utf-8")).items():
        sides: dict[str, list[str]] = {side: [] for side in (*SIDES, "training")}
        for name, text in documents:
            # The chunks of one file stay on one side.
            sides[side_of(name.rsplit(":", 1)[0] if domain == "math" else name)].append(text)
        training[domain] = sides["training"]
        for side in SIDES:
            held_out = "\n\n".join(text[:LONGEST] for text in sides[side])[:CHARACTERS]
            (out / f"{side}_{domain}.txt").write_text(held_out, encoding="utf-8")
        print(domain, {side: len(texts) for side, texts in sides.items()}, flush=True)
    make_corpus.VOCAB = VOCAB
    tokenizer = make_corpus.train_tokenizer(training)
    tokenizer.save(str(out / "tokenizer.json"))
    separator = tokenizer.encode(SEPARATOR).ids
    tokens: dict[str, np.ndarray] = {}
    for domain, texts in training.items():
        ids = [encoded.ids + separator for encoded in tokenizer.encode_batch(texts, add_special_tokens=False)]
        tokens[domain] = np.concatenate([np.array(part, dtype=np.uint16) for part in ids])
        print(domain, f"{len(tokens[domain]) / 1e6:.1f} M tokens", flush=True)
    np.savez(out / "train.npz", allow_pickle=False, **tokens)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
