"""Quantize a checkpoint by llm-compressor without calibration, keeping release names.

.peers/llmcompressor/bin/python llmcompressor_write.py MODEL OUT SCHEME...
"""

# pyright: reportMissingImports=false

import sys

from llmcompressor import model_free_ptq

IGNORE = ["lm_head", "re:.*block_sparse_moe.gate$", "re:.*embed_tokens$"]

if __name__ == "__main__":
    for scheme in sys.argv[3:]:
        model_free_ptq(
            sys.argv[1], f"{sys.argv[2]}/{scheme}", scheme=scheme, ignore=IGNORE, device="cpu", max_workers=1
        )
