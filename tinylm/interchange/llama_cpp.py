"""What llama.cpp makes of a GGUF file, asked in a process of its own: native code that fails must not take a command with it.

    python -m tinylm.interchange.llama_cpp FILE < questions.json > answers.json

Needs llama-cpp-python. Its kernels for repacked weights are left out: some of them crash on processors that they misjudge.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Answers:
    """`ids` of each text, summed `nats` of each row's tokens after its first, and the greedy `continuation` of the prompt."""

    ids: list[list[int]]
    nats: float
    continuation: list[int]


def installed() -> bool:
    return importlib.util.find_spec("llama_cpp") is not None


def ask(file: Path, texts: list[str], rows: list[list[int]], prompt: list[int], new_tokens: int) -> Answers | str:
    """The answers, or in a sentence why there are none."""
    questions = {"texts": texts, "rows": rows, "prompt": prompt, "new_tokens": new_tokens}
    command = [sys.executable, "-m", __spec__.name, str(file)]
    done = subprocess.run(command, input=json.dumps(questions).encode(), capture_output=True, check=False)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        return f"signal {-done.returncode}" if done.returncode < 0 else (said or ["it says nothing"])[-1]
    return Answers(**json.loads(done.stdout))


def _answer(file: str, questions: dict[str, Any]) -> dict[str, Any]:
    import llama_cpp
    import numpy as np
    from llama_cpp import llama_cpp as native

    defaults = native.llama_model_default_params

    def without_repacking() -> Any:
        parameters = defaults()
        parameters.use_extra_bufts = False
        return parameters

    native.llama_model_default_params = without_repacking
    longest = max(len(questions["prompt"]) + questions["new_tokens"], *(len(row) for row in questions["rows"]))
    model = llama_cpp.Llama(
        file, n_ctx=longest, n_batch=longest, n_threads=1, n_threads_batch=1, n_gpu_layers=0, logits_all=True, verbose=False
    )

    def logits(ids: list[int]) -> Any:
        model.reset()
        model.eval(ids)
        return np.array(model.scores[: len(ids)], dtype=np.float64)

    nats = 0.0
    for row in questions["rows"]:
        scores = logits(row)[:-1]
        highest = scores.max(axis=1)
        totals = highest + np.log(np.exp(scores - highest[:, None]).sum(axis=1))
        nats += float((totals - scores[np.arange(len(row) - 1), row[1:]]).sum())
    written = list(questions["prompt"])
    for _ in range(questions["new_tokens"]):
        written.append(int(logits(written)[-1].argmax()))
    ids = [model.tokenize(text.encode(), add_bos=False, special=False) for text in questions["texts"]]
    return {"ids": ids, "nats": nats, "continuation": written[len(questions["prompt"]) :]}


if __name__ == "__main__":
    print(json.dumps(_answer(sys.argv[1], json.load(sys.stdin))))
