"""Kill a training again and again, at random moments and inside saves, and compare what it becomes with one that was left alone.

    python benchmarks/soak.py [--kills 50] [--processes 1] [--parallel ddp|fsdp] [--precision fp32|bf16] [--seed 1]

Dropout is on, a step has four micro-batches for each process at least, epochs end on the way, and every second step is saved. Each
life is a process (or several) of its own that is ended by SIGKILL. At the end every logged number, every weight and every moment of
the optimizer must be the same bits. Prints a line per life and one at the end; exit status 1 when anything differs.
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
CLOCK = ("seconds", "train_seconds", "tokens_per_second", "mfu")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return int(found.getsockname()[1])


def started(recipe: Path, folder: Path, processes: int) -> list[subprocess.Popen[bytes]]:
    """The processes of one life, set up as a launcher does."""
    port = str(free_port())
    command = [sys.executable, "-m", "tinylm", "train", str(recipe), "--out", str(folder), "--resume", "--quiet", "--threads", "1"]
    lives = []
    for rank in range(processes):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        there = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            **({name: str(value) for name, value in place.items()} if processes > 1 else {}),
        }
        lives.append(subprocess.Popen(command, env=there, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    return lives


def lines(folder: Path) -> int:
    metrics = folder / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def saving(folder: Path) -> bool:
    return any((folder / "checkpoints").glob(".step-*.partial"))


def life(recipe: Path, folder: Path, processes: int, chance: random.Random, in_save: bool, leap: int) -> bool:
    """One life, to a random moment or the end. Whether it was killed."""
    lives, wanted = started(recipe, folder, processes), lines(folder) + chance.randint(1, leap)
    victim = lives[chance.randrange(processes)]
    while not (lines(folder) >= wanted and (not in_save or saving(folder))):
        if victim.poll() is not None:
            break
        time.sleep(0.0003)
    if not in_save:
        time.sleep(chance.random() * 0.02)
    killed = victim.poll() is None
    if killed:
        victim.send_signal(signal.SIGKILL)
    for each in lives:
        each.wait(timeout=120)
    return killed


def logged(folder: Path) -> list[dict[str, Any]]:
    read = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in read]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    reader = HuggingFaceStorageReader(str(Run(folder).checkpoint("last").path))
    stored = reader.read_metadata().state_dict_metadata
    found = {name: torch.zeros(entry.size, dtype=entry.properties.dtype) for name, entry in stored.items()}
    load(found, storage_reader=reader, no_dist=True)
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--kills", type=int, default=50)
    options.add_argument("--processes", type=int, default=1)
    options.add_argument("--parallel", default="auto")
    options.add_argument("--precision", default="fp32")
    options.add_argument("--seed", type=int, default=1)
    chosen = options.parse_args()
    chance = random.Random(chosen.seed)
    with tempfile.TemporaryDirectory() as place:
        os.environ["TINYLM_CACHE"] = str(Path(place) / "cache")
        text, recipe = Path(place) / "text.txt", Path(place) / "soak.yaml"
        text.write_text("\n\n".join(topic for _, topic in sorted(pydoc_data.topics.topics.items()))[1000:9000], encoding="utf-8")
        leap, micro = 8, max(1, 2 // chosen.processes)
        steps = leap * chosen.kills
        recipe.write_text(
            RECIPE.format(text=text, steps=steps, micro=micro, precision=chosen.precision, parallel=chosen.parallel),
            encoding="utf-8",
        )
        whole, folder = Path(place) / "whole", Path(place) / "killed"
        for each in started(recipe, whole, chosen.processes):
            assert each.wait() == 0
        kills = in_saves = 0
        killed = True
        while killed:
            killed = life(recipe, folder, chosen.processes, chance, kills % 3 == 0, leap if kills < chosen.kills else 10 * steps)
            if killed:
                kills += 1
                in_saves += saving(folder)
                print(f"life {kills}: killed after line {lines(folder)} of {lines(whole)}{', in a save' if saving(folder) else ''}")
        same_log = logged(folder) == logged(whole)
        ours, theirs = tensors(folder), tensors(whole)
        same = ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())
        print(
            f"{kills} kills, {in_saves} of them in a save, {steps} steps, {chosen.processes} processes, {chosen.precision}: "
            f"log {'the same' if same_log else 'DIFFERENT'}, {len(ours)} tensors {'the same bits' if same else 'DIFFERENT'}"
        )
        sys.exit(0 if same_log and same else 1)


if __name__ == "__main__":
    main()
