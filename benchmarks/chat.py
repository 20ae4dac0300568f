"""Fine-tune a run on questions and answers, with and without `data.mix`, and measure answer quality and forgetting.

    python benchmarks/chat.py RUN --minutes 10
    python benchmarks/chat.py RUN --minutes 0.5 --task arithmetic --pairs 200

RUN is a run folder, such as runs/quickstart. The script generates the data: `docstrings` asks what functions in the standard
library do and expects the first sentence of their documentation, `arithmetic` asks for sums, and `reverse` asks for reversed words.
One tenth of the pairs are held out. The script measures the loss on their answers, the exact-match rate, the stop rate and
forgetting: the change in bits per byte on RUN's own held-out text, which `data.mix` does not train on. In the table, "before" is
the model after its control tokens were added and before it is fine-tuned.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from tinylm.evaluation.evaluate_run import evaluate_run
from tinylm.generation.chat_evaluation import evaluate_chat_run
from tinylm.pipeline import train
from tinylm.recipe import loads
from tinylm.recipe.chat import ChatSection
from tinylm.run import Run
from tinylm.suggest_chat import suggest_chat_recipe

MODULES = (  # noqa: SIM905
    "argparse ast asyncio base64 bisect calendar cmath codecs collections colorsys copy csv datetime decimal difflib dis "
    "email.utils fileinput fnmatch fractions functools gettext glob gzip hashlib heapq html inspect io ipaddress itertools "
    "json keyword linecache locale logging math mimetypes operator os os.path pathlib pickle pkgutil platform pprint queue "
    "random re sched secrets shlex shutil signal socket statistics string struct subprocess sys sysconfig tarfile tempfile "
    "textwrap threading time timeit token tokenize traceback types typing unicodedata unittest urllib.parse uuid warnings "
    "weakref xml.etree.ElementTree zipfile zlib"
).split()
Pair = tuple[str, str]


def docstrings() -> Iterator[Pair]:
    """Yield a question about each public function in the standard library, and the first sentence of its documentation."""
    for name in MODULES:
        module = importlib.import_module(name)
        for member in sorted(vars(module)):
            value = getattr(module, member)
            documentation = inspect.getdoc(value) if callable(value) and not member.startswith("_") else None
            if documentation:
                sentence = documentation.split("\n\n")[0].replace("\n", " ").split(". ")[0].rstrip(".") + "."
                if 15 <= len(sentence) <= 120 and "->" not in sentence:
                    yield f"What does {name}.{member} do?", sentence


def arithmetic() -> Iterator[Pair]:
    """Yield a question about each sum of two numbers below 100, and its answer."""
    for first in range(100):
        for second in range(100):
            yield f"What is {first} + {second}?", str(first + second)


def reverse() -> Iterator[Pair]:
    """Yield a request to reverse each short word, and the reversed word."""
    for name in sorted({member for module in MODULES for member in dir(importlib.import_module(module))}):
        if name.isalpha() and name.islower() and 3 <= len(name) <= 8:
            yield f"Reverse {name}.", name[::-1]


TASKS = {"docstrings": docstrings, "arithmetic": arithmetic, "reverse": reverse}


def write_pairs(file: Path, task: str, count: int, seed: int) -> int:
    """Write a random sample of a task's pairs and return its size."""
    pairs = list(dict.fromkeys(TASKS[task]()))
    random.Random(seed).shuffle(pairs)
    chosen = pairs[:count]
    with open(file, "w", encoding="utf-8") as stream:
        for question, answer in chosen:
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            stream.write(json.dumps({"messages": turns}) + "\n")
    return len(chosen)


def row(name: str, run: Run, checkpoint: str, text: Run, seconds: float | None) -> str:
    """Return a row of the table. Bits per byte are computed on the held-out text of the run `text`."""
    chat = evaluate_chat_run(run, checkpoint=checkpoint, device="cpu").as_dict()
    bits = bits_on_text(run, checkpoint, text)
    time = "" if seconds is None else f"{seconds:.0f}"
    return f"| {name} | {chat['loss']:.4f} | {chat['exact_match']:.1%} | {chat['stop_rate']:.1%} | {bits:.4f} | {time} |"


def bits_on_text(run: Run, checkpoint: str, text: Run) -> float:
    """Return the bits per byte of `run`, with its own tokenizer, on the held-out text of the run `text`."""
    shard = text.heldout()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "heldout.jsonl"
        documents = (text.tokenizer.decode(shard.tokens[start:end].tolist()) for start, end in shard.documents())
        file.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents), encoding="utf-8")
        return evaluate_run(run, [str(file)], checkpoint=checkpoint, device="cpu").perplexity.bits_per_byte


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--minutes", type=float, default=10.0, help="training time per variant, in minutes")
    parser.add_argument("--task", choices=TASKS, default="docstrings")
    parser.add_argument("--pairs", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    base = Run.open(arguments.run)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count = write_pairs(folder / "pairs.jsonl", arguments.task, arguments.pairs, arguments.seed)
        suggestion = suggest_chat_recipe(
            ChatSection(train=(str(folder / "pairs.jsonl"),)), base, name="chat", minutes=arguments.minutes
        )
        settings = (f"seed={arguments.seed}", "training.compile=off", "training.log_every=1000000")
        print(f"{arguments.task}: {count} pairs, one tenth of them held out; {arguments.minutes:g} minutes per variant\n")
        print("| model | answer loss | exact match | stop rate | bits per byte on RUN's text | training time (s) |")
        print("|---|---|---|---|---|---|")
        for variant, more in (("without mix", ("data.mix=null",)), ("with mix", ())):
            recipe = loads(suggestion.yaml, (*settings, *more))
            if variant == "without mix":
                untrained = ("training.minutes=null", "training.steps=1", "training.optimizer={name: adamw, lr: 1e-12}")
                before = loads(suggestion.yaml, (*settings, *more, *untrained))
                train(before, folder / "before", device="cpu", threads=arguments.threads)
                print(row("before", Run.open(folder / "before"), "last", base, None), flush=True)
            result = train(recipe, folder / variant, device="cpu", threads=arguments.threads)
            print(row(variant, Run.open(folder / variant), "last", base, result.seconds), flush=True)


if __name__ == "__main__":
    main()
