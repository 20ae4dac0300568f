"""Evaluate a GGUF file with llama.cpp in a separate process, so that a crash in native code does not kill the caller.

    python -m tinylm.interchange.llama_cpp FILE < inputs.json > outputs.json

This requires llama-cpp-python. Its kernels for repacked weights are disabled, because some misdetect CPU features and crash.
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
class LlamaCppResult:
    """llama.cpp's results for the inputs of `run`."""

    ids: list[list[int]]
    """The token ids of each text."""
    nats: float
    """The loss summed over all tokens except the first token in each row."""
    continuation: list[int]
    """The greedy continuation of the prompt."""


def installed() -> bool:
    return importlib.util.find_spec("llama_cpp") is not None


def run(file: Path, texts: list[str], rows: list[list[int]], prompt: list[int], new_tokens: int) -> LlamaCppResult | str:
    """Run llama.cpp on `file`. Return an error message if llama.cpp fails.

    `texts` are tokenized, `rows` of token ids are scored, and `prompt` is continued with `new_tokens` tokens.
    """
    inputs = {"texts": texts, "rows": rows, "prompt": prompt, "new_tokens": new_tokens}
    command = [sys.executable, "-m", __spec__.name, str(file)]
    process = subprocess.run(command, input=json.dumps(inputs).encode(), capture_output=True, check=False)
    if process.returncode:
        errors = process.stderr.decode(errors="replace").strip().splitlines()
        return f"signal {-process.returncode}" if process.returncode < 0 else (errors or ["no error message"])[-1]
    return LlamaCppResult(**json.loads(process.stdout))


def _evaluate(file: str, inputs: dict[str, Any]) -> dict[str, Any]:
    import llama_cpp
    import numpy as np
    from llama_cpp import llama_cpp as native

    defaults = native.llama_model_default_params

    def without_repacking() -> Any:
        parameters = defaults()
        parameters.use_extra_bufts = False
        return parameters

    native.llama_model_default_params = without_repacking
    context = max(len(inputs["prompt"]) + inputs["new_tokens"], *(len(row) for row in inputs["rows"]))
    model = llama_cpp.Llama(
        file, n_ctx=context, n_batch=context, n_threads=1, n_threads_batch=1, n_gpu_layers=0, logits_all=True, verbose=False
    )

    def logits(ids: list[int]) -> Any:
        model.reset()
        model.eval(ids)
        return np.array(model.scores[: len(ids)], dtype=np.float64)

    nats = 0.0
    for row in inputs["rows"]:
        scores = logits(row)[:-1]
        highest = scores.max(axis=1)
        logsumexp = highest + np.log(np.exp(scores - highest[:, None]).sum(axis=1))
        nats += float((logsumexp - scores[np.arange(len(row) - 1), row[1:]]).sum())
    sequence = list(inputs["prompt"])
    for _ in range(inputs["new_tokens"]):
        sequence.append(int(logits(sequence)[-1].argmax()))
    ids = [model.tokenize(text.encode(), add_bos=False, special=False) for text in inputs["texts"]]
    return {"ids": ids, "nats": nats, "continuation": sequence[len(inputs["prompt"]) :]}


if __name__ == "__main__":
    print(json.dumps(_evaluate(sys.argv[1], json.load(sys.stdin))))
