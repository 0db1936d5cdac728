"""docs/results.md as text, from stored results."""

from __future__ import annotations

from typing import Any


def page(stored: list[dict[str, Any]]) -> str:
    """docs/results.md."""
    lines = [INTRODUCTION, *(line for found in stored for line in model_section(found)), RECIPE]
    return "\n".join(lines)


def model_section(found: dict[str, Any]) -> list[str]:
    """The tables of one model."""
    sample, machine = found["sample"], found["machine"]
    title = (
        f"## {found['model']}: {sample['positions']:,} positions in {sample['windows']} windows of {sample['context']}"
    )
    made = f" of commit {found['commit']}" if found.get("commit") else ""
    facts = (
        f"{found['dtype']}, {machine['device']}, torch {machine['torch']}, {found['generated'][:10]}{made}; "
        "mean KLD in nats,"
    )
    lines = ["", title, "", f"{facts} 95 % interval by {sample['interval']['unit']}s.", ""]
    lines += ["| file | by | bytes | bits a weight | KLD exact | 95 % | 99.9 % | top-1 % | as engines compute it |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    lines += [numbers_row(row) for row in found["rows"]]
    if found["floors"]:
        floors = ", ".join(f"{f['kind'].removeprefix('floor: ')} {f['kld']:.2g}" for f in found["floors"])
        lines += ["", f"Noise floor (the original against itself, mean KLD): {floors}."]
    lines += ["", "Against the same bytes by other rules, paired on the same windows:", ""]
    lines += ["| file | other | KLD ours / theirs | difference | 95 % | p | nearer than theirs |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    by = {(row["file"], row["by"]): row["kld"] for row in found["rows"]}
    for pair in found["pairs"]:
        ratio = by[pair["file"], "mmquant"] / by[pair["file"], pair["by"]]
        lines.append(f"| {pair['file']} | {pair['by']} | {ratio:.2f} | {pair_cells(pair)} |")
    return lines


def pair_cells(pair: dict[str, Any]) -> str:
    """Difference, interval, p and what may be claimed."""
    if "kld" not in pair:
        return " |  |  | not comparable"
    low, high = pair["kld"]["ci95"]
    holds = {"better": "yes", "worse": "no: farther"}.get(pair["verdict"], "not shown")
    return f"{pair['kld']['difference']:+.4f} | {low:+.4f} .. {high:+.4f} | {pair['kld']['p']:.2g} | {holds}"


def numbers_row(row: dict[str, Any]) -> str:
    """One file."""
    groups: dict[str, list[str]] = {}  # profiles that say the same
    for like in row["engine_like"]:
        cache = "" if like["inputs"]["cache"] == "16bit" else f", {like['inputs']['cache']} cache"
        groups.setdefault(f"{like['kld']:.4f}{cache}", []).append(like["profile"])
    likes = "; ".join(f"{', '.join(names)} {value}" for value, names in groups.items())
    ci = f"{row['ci95'][0]:.4f} .. {row['ci95'][1]:.4f}" if row["ci95"] else ""
    numbers = f"{row['bytes']:,} | {row['bits_per_weight']:.2f} | {row['kld']:.4f} | {ci} | {row['p999']:.3f}"
    return f"| {row['file']} | {row['by']} | {numbers} | {100 * row['top1']:.1f} | {likes or 'no profile of mlx_lm'} |"


INTRODUCTION = """# Results: every format, exact and as engines compute it

`make results` writes this page from `docs/results/*.json`, which `python bench/results.py measure` stored. Nothing on
it is typed by hand but this paragraph and the recipe at its end. "KLD exact" is the distance of the stored weights; "as
engines compute it" adds what an engine rounds on the way (`mmquant eval --engine-like`, [eval.md](eval.md)). Rows by
something else than mmquant hold other people's rules at the bytes of our file in that format; stock GGUF is ggml's own
encoder under llama-imatrix's sums of the same calibration text. No number of M2.7 is here: nobody has run it yet. The
demo has 14.4 M weights; what it shows is order and sign, not the size of a loss at 229 B."""


RECIPE = """
## The same page for MiniMax-M2.7, on a node

    python bench/results.py make hf:MiniMaxAI/MiniMax-M2.7 --folder m27 --dry-run   # writes m27.yaml
    torchrun --nproc-per-node 8 -m mmquant run m27.yaml --out m27
    torchrun --nproc-per-node 8 bench/results.py measure hf:MiniMaxAI/MiniMax-M2.7 --folder m27 --name m27 \\
      --context 2048 --windows 128 --imatrix m27.imatrix.gguf
    make results

On 8 GPUs of 80 GB. The files are written in one pass over the model ([run.md](run.md)); `m27.imatrix.gguf` is
llama-imatrix's, or in its form `mmquant calibrate --moments diagonal --weighting uniform --imatrix m27.imatrix.gguf`,
as for the demo's rows (without it ggml's encoder has no importance). Then one pass over the layers scores all.
Estimates, none of it measured; the speeds are those of [eval.md](eval.md) and of one H200 in `bench/RESULTS.md`:

| what | estimate |
| --- | --- |
| disk | 229 G weights x bits a weight / 8: FP8 230 GB, Q8_0 243, others 120 to 190; 2.4 TB for all rows |
| making | a layer of all rows on one H200: 56 s (INT4 2.3, FP4 and MLX 3.3, k-quants 8.9); 8 at 60 %: 12 minutes |
| writing | 2.4 TB at 2 GB/s: 20 minutes |
| host memory | hidden states: 262,144 tokens x 12 KB = 3.2 GB for each of about 70 models, beyond 8 GiB in files |
| GPU memory | a layer in float32 14.6 GB, twice that where an engine's weights differ, activations 16 GB |
| reading | 2.4 TB at 3 GB/s: 13 minutes, or as long as the download takes |
| layers | float32 on 8 GPUs about 1.2 s a layer and model, 70 models x 62 layers: 87 minutes |
| head and metrics | 200,064 tokens: 1.5 minutes a model on 8 GPUs, 105 minutes |

A model is a file, its rival, or one of them as an engine computes it (26 rows, 44 more by profiles).
`--rows int4 nvfp4 gguf-Q4_K_M` takes some of them; `--state DIR` goes on after a stop."""
