"""Measure how long `tinylm inspect --out` takes, and check that heads form when a model is trained on documentation.

    python benchmarks/inspection.py [small] [large] [heads] [--work FOLDER]

- `small`: the page of a model with 6 layers of 6 heads and width 384, for 128 tokens. Limits: 10 s and 5 MB.
- `large`: the page of an imported model of GPT-2's size (124 million parameters) with random weights. Limits: 90 s, 4 GiB, 10 MB.
- `heads`: train byte-level models on the built-in documentation with three seeds. Each of them must have a previous-token or an
  induction head, which a random model must not have.

All parts run by default. The models of the first two parts are created on the first run. Prints the wall time, CPU time and peak
memory of each command, and exits with code 1 if a limit is exceeded. Measure on two idle cores.
"""

from __future__ import annotations

import argparse
import os
import pydoc_data.topics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from tinylm.inspection import HeadScores, head_scores
from tinylm.model.transformer import Transformer
from tinylm.recipe.schema import DecoderSection
from tinylm.run import Run

PARTS = ("small", "large", "heads")
TOKENS = 128
TEXT = "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
RECIPE = """\
data: {train: builtin:python-docs, heldout: {share: 0.05, by: document}}
tokenizer: {kind: bpe, vocab_size: 4096}
model: {n_layer: 6, n_head: 6, n_embd: 384, context_length: 256}
training: {steps: 1, global_batch_size: 1, precision: fp32, compile: off}
"""
HEAD_STEPS = 300


def tinylm(*arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "tinylm", *map(str, arguments)], check=True)


def small_run(work: Path) -> Path:
    """Train a model for one step and return its run folder."""
    run = work / "small"
    if not run.exists():
        (work / "small.yaml").write_text(RECIPE)
        tinylm("train", work / "small.yaml", "--out", run, "--quiet")
    return run


def large_run(work: Path) -> Path:
    """Import a GPT-2 model with random weights that uses the tokenizer of the small run."""
    run = work / "large"
    if not run.exists():
        from transformers import GPT2Config, GPT2LMHeadModel

        folder = work / "gpt2"
        GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)
        tinylm("import", folder, "--tokenizer", small_run(work) / "tokenizer.json", "--out", run, "--quiet")
    return run


def measure_page(run: Path, work: Path, *options: str | Path, seconds: float, gigabytes: float, megabytes: float) -> bool:
    """Write the page of a run, print what it took, and return whether the limits were kept."""
    page = work / f"{run.name}.html"
    text = Run.open(run).tokenizer.decode(Run.open(run).tokenizer.encode(TEXT[:4000])[:TOKENS])
    command = [sys.executable, "-m", "tinylm", "inspect", "--run", run, "--text", text, "--out", page, "--overwrite", *options]
    start = time.perf_counter()
    process = subprocess.Popen(list(map(str, command)))
    _, status, usage = os.wait4(process.pid, 0)
    wall, peak = time.perf_counter() - start, usage.ru_maxrss / 2**20
    size = page.stat().st_size / 1e6
    cpu = usage.ru_utime + usage.ru_stime
    print(f"{run.name:6} wall {wall:.1f} s   CPU {cpu:.1f} s   peak {peak:.2f} GiB   page {size:.2f} MB", flush=True)
    return status == 0 and wall <= seconds and peak <= gigabytes and size <= megabytes


def train_on_documentation(seed: int) -> bool:
    """Train a small byte-level model, print its largest head scores, and return whether only the trained model has such heads."""
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 64, "context_length": 64}
    network = Transformer(DecoderSection.model_validate({"preset": "llama", **shape}), 256, seed=seed).eval()
    data = torch.tensor(list(TEXT[:60_000].encode()))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.0)
    before, start = head_scores(network), time.process_time()
    for _ in range(HEAD_STEPS):
        starts = torch.randint(len(data) - 65, (16,), generator=generator)
        tokens = data[starts[:, None] + torch.arange(65)]
        optimizer.zero_grad()
        (network(tokens[:, :-1], targets=tokens[:, 1:]) / tokens[:, 1:].numel()).backward()
        optimizer.step()
    after = head_scores(network)
    scores = ", ".join(
        f"{kind} {before.of(kind).max():.2f} -> {after.of(kind).max():.2f}" for kind in ("previous_token", "induction")
    )
    print(f"heads  seed {seed}: {scores}   CPU {time.process_time() - start:.1f} s", flush=True)
    return not kinds(before) and bool(kinds(after) & {"previous_token", "induction"})


def kinds(scores: HeadScores) -> set[str]:
    layers, heads = scores.induction.shape
    found = (scores.kind(layer, head) for layer in range(layers) for head in range(heads))
    return {kind for kind in found if kind is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="small, large or heads (default: all)")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "tinylm-inspection", help="folder for models")
    arguments = parser.parse_args()
    parts = arguments.parts or PARTS
    if unknown := set(parts) - set(PARTS):
        parser.error(f"unknown part: {', '.join(sorted(unknown))}")
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    passed = []
    if "small" in parts:
        passed.append(measure_page(small_run(work), work, seconds=10, gigabytes=4, megabytes=5))
    if "large" in parts:
        text = work / "text.txt"
        text.write_text(TEXT[:20_000])
        passed.append(measure_page(large_run(work), work, "--on", text, seconds=90, gigabytes=4, megabytes=10))
    if "heads" in parts:
        torch.set_num_threads(1)
        passed += [train_on_documentation(seed) for seed in range(3)]
    sys.exit(0 if all(passed) else 1)


if __name__ == "__main__":
    main()
