"""Recipes to begin with: `mmquant run --init`."""

from __future__ import annotations

import shlex

MODEL = "hf:MiniMaxAI/MiniMax-M2.7"
HEAD = """\
# A recipe of mmquant: every variant below in one pass over the checkpoint.
{commands}
# a folder, hf:ORG/NAME[@REV], ms:ORG/NAME[@REV] or demo
model: {model}
# revision: COMMIT    # pins the model; by default the first run's commit
# device: cuda:0      # by default a GPU when there is one

corpora:              # calibration text; of several a variant names one: corpus
  main:
    text: [default]   # files, folders, PATH=WEIGHT; `default`: the bundled text
    windows: 256
    # context: 2048

variants:             # NAME: a folder in DIR; options are those of the command
{variants}
check:                # scored against the model; leave it out to write only
  windows: 64
  gates:
    max_kld: {gate}   # exit code 4 when one fails; what fails is not pushed

fit:                  # machines of the artifacts: in summary, manifest, FIT.md
  targets: [{targets}]
  # context: 32768    # tokens that must fit; by default the largest that does
  # machines: my.yaml # more machines, as of mmquant fit --targets

# limits:             # what does not fit ends with exit code 5, early if it can
#   disk: 300GB       # of artifacts, shards and hidden states together
#   shards: 4         # of the source on disk at once
#   ram: 64GB         # of this process
#   gpu: 80GB         # of the device
{push}"""
PUSH = """
push:
  - repo: me/MiniMax-M2.7-GGUF
    hub: hf           # or ms
    variants: [{names}]
    # private: true       # a new repository is private until you open it
    # as_completed: true  # parts leave when whole (with private, pr or a revision)
    delete_after_upload: true
"""
GGUF = ("Q2_K", "IQ3_XXS", "Q3_K_M", "IQ4_XS", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")


def _gguf(names: tuple[str, ...]) -> str:
    return "".join(f"  {name}: {{command: gguf, type: {name}}}\n" for name in names)


VARIANTS = {
    "publisher": _gguf(GGUF) + "  imatrix: {command: calibrate, moments: diagonal, imatrix: imatrix.gguf}\n",
    "2xa100": "  int4-g32: {command: int4, group_size: 32, attention: bf16}\n"
    "  int4-g128: {command: int4, group_size: 128, attention: bf16}\n"
    "  # planned: {command: int4, target: 2xA100-80GB}  # some layers wider\n",
    "24gb": _gguf(("IQ2_M", "IQ3_M", "IQ4_XS"))  # the README's rows, with 64, 96 and 128 GB of RAM
    + "  # planned: {command: gguf, target: 24GB+96GB}  # its best types\n",
    "": "  fp8: {command: fp8}\n  int4: {command: int4, group_size: 32}\n" + _gguf(("Q4_K_M", "IQ2_XXS")),
}
TARGETS = {
    "publisher": "24GB+96GB, 24GB+128GB",
    "2xa100": "2xA100-80GB",
    "24gb": "24GB+64GB, 24GB+96GB, 24GB+128GB",
    "": "24GB+96GB, 2xA100-80GB",
}
GATES = {"publisher": 1.0, "2xa100": 0.15, "24gb": 2.0, "": 2.0}
PURPOSES = tuple(name for name in VARIANTS if name)


def template(purpose: str | None = None, model: str = MODEL, file: str = "recipe.yaml") -> str:
    """A commented recipe for a purpose: publisher, 2xa100, 24gb, or one of each command. file: what it is called."""
    chosen = purpose or ""
    push = PUSH.format(names=", ".join(GGUF)) if chosen == "publisher" else ""
    shape = {"variants": VARIANTS[chosen], "gate": GATES[chosen], "targets": TARGETS[chosen], "push": push}
    return HEAD.format(commands=_commands(file), model=model, **shape)


def _commands(file: str) -> str:
    """What to type, and why, in two columns."""
    run = f"mmquant run {shlex.quote(file) if file.isprintable() else 'RECIPE'} --out DIR"
    rows = {f"{run} --dry-run": "what it needs", run: "run again, it continues", "mmquant status DIR": "how far it is"}
    width = max(map(len, rows))
    return "\n".join(f"#   {typed:<{width}}   {why}" for typed, why in rows.items())
