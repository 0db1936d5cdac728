"""Split the collected text by document into training, calibration and evaluation, and train the tokenizer.

    python make_corpus.py corpus.json OUT

writes OUT/train.json.xz (domain -> documents), OUT/calib_DOMAIN.txt, OUT/eval_DOMAIN.txt and OUT/tokenizer.json.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import random
import sys
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB = 2048
EVALUATION, CALIBRATION = 3, 3  # percent of the documents
TRAINING_CHARACTERS = {"code": 60_000_000, "docs": 50_000_000}  # prose and zh: all there is
LONGEST_TRAINING, LONGEST_HELD_OUT = 60_000, 20_000  # characters of one document
HELD_OUT_CHARACTERS = 1_500_000  # of one domain
TOKENIZER_DOCUMENTS, TOKENIZER_CHARACTERS = 700, 8_000  # a domain, a document

# The pre-tokenizer of MiniMax-M2's tokenizer.json (GPT-4o's: letters with case, numbers up to three digits).
WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ("]!d~[", "]!p~[", "]~b]", "[e~[", "]~!b[", "<think>", "</think>")
SPECIAL += ("<minimax:tool_call>", "</minimax:tool_call>")


def split(documents: list[tuple[str, str]]) -> tuple[list[str], list[str], list[str]]:
    """Training, calibration and evaluation texts; a document's name decides, so the split never moves."""
    training, calibration, evaluation = [], [], []
    for name, text in documents:
        bucket = int(hashlib.md5(name.encode()).hexdigest(), 16) % 100
        if bucket < EVALUATION:
            evaluation.append(text)
        elif bucket < EVALUATION + CALIBRATION:
            calibration.append(text)
        else:
            training.append(text)
    return training, calibration, evaluation


def capped(texts: list[str], limit: int | None) -> list[str]:
    """Shuffled texts, each cut, until `limit` characters are passed."""
    random.shuffle(texts)
    kept, characters = [], 0
    for text in texts:
        kept.append(text[:LONGEST_TRAINING])
        characters += len(kept[-1])
        if limit is not None and characters > limit:
            break
    return kept


def held_out(texts: list[str]) -> str:
    return "\n\n".join(text[:LONGEST_HELD_OUT] for text in texts)[:HELD_OUT_CHARACTERS]


def train_tokenizer(training: dict[str, list[str]]) -> Tokenizer:
    """Byte-level BPE with MiniMax-M2's pre-tokenizer and special tokens, the latter at the end of the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    pieces = [
        pre_tokenizers.Split(Regex(WORDS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(pieces)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    sample = [
        text[:TOKENIZER_CHARACTERS]
        for texts in training.values()
        for text in random.sample(texts, min(len(texts), TOKENIZER_DOCUMENTS))
    ]
    tokenizer.train_from_iterator(sample, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


def main(corpus: Path, out: Path) -> None:
    random.seed(0)
    out.mkdir(parents=True, exist_ok=True)
    training: dict[str, list[str]] = {}
    for domain, documents in json.loads(corpus.read_text(encoding="utf-8")).items():
        texts, calibration, evaluation = split(documents)
        training[domain] = capped(texts, TRAINING_CHARACTERS.get(domain))
        (out / f"calib_{domain}.txt").write_text(held_out(calibration), encoding="utf-8")
        (out / f"eval_{domain}.txt").write_text(held_out(evaluation), encoding="utf-8")
        print(domain, len(training[domain]), "training documents,", len(evaluation), "for evaluation")
    train_tokenizer(training).save(str(out / "tokenizer.json"))
    with lzma.open(out / "train.json.xz", "wb", preset=4) as file:
        file.write(json.dumps(training, ensure_ascii=False).encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
