"""Crash test: repeatedly kill a training run, sometimes during a save, and resume it. Compare it with an uninterrupted run.

    python benchmarks/soak.py [--kills 50] [--processes 1] [--parallel ddp|fsdp] [--precision fp32|bf16] [--seed 1]

The recipe uses dropout, gradient accumulation and several epochs, and saves every second step. Each attempt starts new processes
and kills one of them with SIGKILL. At the end, all logged numbers, weights and optimizer moments must be bitwise equal to those of
the uninterrupted run. The script prints a line per attempt and a summary. The exit status is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import pydoc_data.topics
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import HuggingFaceStorageReader, load

from tinylm.run import Run

RECIPE = """\
name: soak
seed: 1
data: {{train: {text}}}
tokenizer: {{kind: bpe, vocab_size: 400}}
model: {{n_layer: 2, n_head: 2, n_embd: 32, context_length: 32, dropout: 0.2}}
training: {{steps: {steps}, global_batch_size: 8, micro_batch_size: {micro}, precision: {precision}, parallel: {parallel},
           compile: off, log_every: 1}}
evaluation: {{every: 7, max_tokens: 300}}
checkpoint: {{every: 2, keep: 2}}
sampling: {{every: 11, max_new_tokens: 3}}
"""
TIMING_KEYS = ("seconds", "train_seconds", "tokens_per_second", "mfu")
"""Keys of metrics.jsonl that differ between identical runs."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def launch(recipe: Path, folder: Path, processes: int) -> list[subprocess.Popen[bytes]]:
    """Start the processes of one attempt, with the environment variables that torchrun sets."""
    port = str(free_port())
    command = [sys.executable, "-m", "tinylm", "train", str(recipe), "--out", str(folder), "--resume", "--quiet", "--threads", "1"]
    workers = []
    for rank in range(processes):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            **({name: str(value) for name, value in variables.items()} if processes > 1 else {}),
        }
        workers.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    return workers


def line_count(folder: Path) -> int:
    metrics = folder / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def is_saving(folder: Path) -> bool:
    return any((folder / "checkpoints").glob(".step-*.partial"))


def run_attempt(recipe: Path, folder: Path, processes: int, rng: random.Random, during_save: bool, max_lines: int) -> bool:
    """Resume the run and kill it after 1 to `max_lines` more lines in metrics.jsonl. Return False if the run finishes first."""
    workers, last_line = launch(recipe, folder, processes), line_count(folder) + rng.randint(1, max_lines)
    victim = workers[rng.randrange(processes)]
    while not (line_count(folder) >= last_line and (not during_save or is_saving(folder))):
        if victim.poll() is not None:
            break
        time.sleep(0.0003)
    if not during_save:
        time.sleep(rng.random() * 0.02)
    killed = victim.poll() is None
    if killed:
        victim.send_signal(signal.SIGKILL)
    for worker in workers:
        worker.wait(timeout=120)
    return killed


def logged_metrics(folder: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in TIMING_KEYS} for line in lines]


def saved_tensors(folder: Path) -> dict[str, torch.Tensor]:
    reader = HuggingFaceStorageReader(str(Run(folder).checkpoint("last").path))
    metadata = reader.read_metadata().state_dict_metadata
    tensors = {name: torch.zeros(entry.size, dtype=entry.properties.dtype) for name, entry in metadata.items()}
    load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--parallel", default="auto")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder_name:
        parent = Path(folder_name)
        os.environ["TINYLM_CACHE"] = str(parent / "cache")
        text, recipe = parent / "text.txt", parent / "soak.yaml"
        text.write_text("\n\n".join(topic for _, topic in sorted(pydoc_data.topics.topics.items()))[1000:9000], encoding="utf-8")
        max_lines, micro = 8, max(1, 2 // options.processes)
        steps = max_lines * options.kills
        recipe.write_text(
            RECIPE.format(text=text, steps=steps, micro=micro, precision=options.precision, parallel=options.parallel),
            encoding="utf-8",
        )
        uninterrupted, folder = parent / "uninterrupted", parent / "killed"
        for worker in launch(recipe, uninterrupted, options.processes):
            assert worker.wait() == 0
        kills = kills_during_save = 0
        killed = True
        while killed:
            limit = max_lines if kills < options.kills else 10 * steps
            killed = run_attempt(recipe, folder, options.processes, rng, kills % 3 == 0, limit)
            if killed:
                kills += 1
                kills_during_save += is_saving(folder)
                progress = f"line {line_count(folder)} of {line_count(uninterrupted)} in metrics.jsonl"
                print(f"attempt {kills}: killed after {progress}{', during a save' if is_saving(folder) else ''}")
        same_log = logged_metrics(folder) == logged_metrics(uninterrupted)
        actual, expected = saved_tensors(folder), saved_tensors(uninterrupted)
        same_tensors = actual.keys() == expected.keys() and all(
            torch.equal(value, expected[name]) for name, value in actual.items()
        )
        print(
            f"{kills} kills, {kills_during_save} of them during a save; {steps} steps, "
            f"{options.processes} process{'es' * (options.processes > 1)}, {options.precision}: "
            f"log {'equal' if same_log else 'DIFFERENT'}, {len(actual)} tensors {'bitwise equal' if same_tensors else 'DIFFERENT'}"
        )
        sys.exit(0 if same_log and same_tensors else 1)


if __name__ == "__main__":
    main()
