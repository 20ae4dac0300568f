"""Vectors against gensim, on this machine: speed and quality in turn, memory, neighbours, and what reuse is worth.

    python benchmarks/embeddings.py speed TEXT... [--methods skipgram cbow] [--rounds 3] [--epochs 1] [--threads 2]
    python benchmarks/embeddings.py glove TEXT... --program FOLDER [--rounds 2] [--epochs 15] [--threads 2]
    python benchmarks/embeddings.py memory [--megabytes 64 1000]
    python benchmarks/embeddings.py neighbours
    python benchmarks/embeddings.py reuse [--steps 300] [--seeds 1 2 3]

`speed` needs gensim. Both sides get the same ids and learn one document at a time; vocabularies are made before the clock
starts. One document in 20 is held out: the held-out loss is that of negative sampling over its windows, with the same
negatives for both sides. `plurals`: how often a word's plural is among its ten nearest. `glove` takes the folder with the
binaries of the published C program (github.com/stanfordnlp/GloVe); both sides get the same words in the same documents.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tinylm.embedding.text import Text

PROBES = ("list", "tuple", "string", "file", "socket", "thread", "exception", "integer", "directory", "bytes")
PIECE = 1000
"""Words in a sentence for gensim, which cuts longer ones off at 10 000."""
TRAIN = """
import sys
from tinylm.embedding_pipeline import train_embeddings
from tinylm.recipe import loads_any
recipe = loads_any("kind: embeddings\\ndata: {train: %s}\\nmethod: {name: %s, epochs: 1}" % tuple(sys.argv[1:3]))
result = train_embeddings(recipe, sys.argv[3])
print(result.peak_memory_bytes >> 20, result.names, result.tokens, round(result.seconds))
"""

Tables = tuple[np.ndarray, np.ndarray]


def _prepared(sources: list[str]) -> Text:
    from tinylm.embedding.text import prepare
    from tinylm.recipe.embeddings import EmbeddingDataSection, WordVocabulary
    from tinylm.reporting import SILENT

    return prepare(EmbeddingDataSection(train=tuple(sources)), WordVocabulary(kind="words"), SILENT)


def glove(arguments: argparse.Namespace) -> None:
    text = _prepared(arguments.text)
    print(f"{text.length:,} tokens of {len(text.units.names):,} words", flush=True)
    sides = {"the C program": _glove_program, "tinylm": _glove_here}
    rates: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    for seed in range(1, arguments.rounds + 1):
        for side, run in sides.items():
            vectors, counting, learning, cells = run(arguments, text, seed)
            rates[side].append((counting, learning))
            rate = cells * arguments.epochs / learning
            plurals = _plurals(vectors, text.units.names)
            print(f"{side:14} counting {counting:5.1f} s, {rate:11,.0f} cells/s of {cells:,}, plurals {plurals:.1%}", flush=True)
    for part, name in enumerate(("counting", "learning")):
        ratio = median(one[part] for one in rates["the C program"]) / median(one[part] for one in rates["tinylm"])
        print(f"{name}: {ratio:.2f} x the C program's speed")


Glove = tuple[np.ndarray, float, float, int]


def _glove_program(arguments: argparse.Namespace, text: Text, seed: int) -> Glove:
    """Vectors, seconds of counting and of learning, and the number of cells, of the published program."""
    names, ids = text.units.names, text.read(0, text.length)
    with tempfile.TemporaryDirectory() as folder:
        words, pairs, mixed, found = (Path(folder, name) for name in ("words", "pairs", "mixed", "vectors"))
        vocabulary = "".join(f"{name} {count}\n" for name, count in zip(names, text.units.counts, strict=True))
        Path(folder, "vocabulary").write_text(vocabulary, encoding="utf-8")
        words.write_text(" ".join("\n" if id < 0 else names[id] for id in ids), encoding="utf-8")

        def program(name: str, source: Path | None, target: Path | None, **options: object) -> None:
            command = [str(Path(arguments.program, name)), "-verbose", "0", "-vocab-file", str(Path(folder, "vocabulary"))]
            command += [part for key, value in options.items() for part in (f"-{key.replace('_', '-')}", str(value))]
            with open(source or os.devnull, "rb") as given, open(target or os.devnull, "wb") as taken:
                subprocess.run(command, stdin=given, stdout=taken, stderr=subprocess.DEVNULL, check=True, cwd=folder)

        start = time.perf_counter()
        program("cooccur", words, pairs, window_size=15, memory=2)
        program("shuffle", pairs, mixed, memory=2, seed=seed)
        counting = time.perf_counter() - start
        options = {"vector_size": 100, "iter": arguments.epochs, "threads": arguments.threads, "x_max": 100, "eta": 0.05}
        start = time.perf_counter()
        program("glove", None, None, input_file=mixed, save_file=found, binary=0, seed=seed, **options)
        learning = time.perf_counter() - start
        rows = {line.split(" ", 1)[0]: line for line in found.with_suffix(".txt").read_text(encoding="utf-8").splitlines()}
        vectors = np.array([np.fromstring(rows[name].split(" ", 1)[1], sep=" ") for name in names], np.float32)
        return vectors, counting, learning, mixed.stat().st_size // 16


def _glove_here(arguments: argparse.Namespace, text: Text, seed: int) -> Glove:
    from tinylm.embedding.glove import Glove as Learner
    from tinylm.recipe.embeddings import GloveMethod
    from tinylm.reporting import SILENT

    with tempfile.TemporaryDirectory() as cache:
        os.environ["TINYLM_CACHE"] = cache
        start = time.perf_counter()
        learner = Learner(text, GloveMethod(name="glove", epochs=arguments.epochs), seed, arguments.threads, SILENT)
        counting = time.perf_counter() - start
        start = time.perf_counter()
        for step in range(learner.steps):
            learner.step(step)
        learning = time.perf_counter() - start
    return (learner.words + learner.contexts)[:, :-1], counting, learning, len(learner.cells)


def speed(arguments: argparse.Namespace) -> None:
    from tinylm.embedding.text import Text, Units

    whole = _prepared(arguments.text)
    ids = whole.read(0, whole.length)
    document = np.cumsum(ids < 0)
    heldout, train = ids[document % 20 == 19], ids[document % 20 != 19]
    counts = np.bincount(train[train >= 0], minlength=len(whole.units.names))
    kept = counts >= 5
    numbers = np.where(kept, np.cumsum(kept) - 1, -2)
    train, heldout = (np.where(half < 0, half, numbers[half]) for half in (train, heldout))
    names = [name for name, keep in zip(whole.units.names, kept, strict=True) if keep]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "ids")
        train = train[train != -2].astype("<i4")
        train.tofile(path)
        text = Text(Units(names, counts[kept], False), path, len(train), "")
        print(f"{len(train):,} tokens of {len(names):,} words to learn, {len(heldout):,} held out", flush=True)
        for method in arguments.methods:
            _both_sides(arguments, method, text, heldout[heldout != -2])


def _both_sides(arguments: argparse.Namespace, method: str, text: object, heldout: np.ndarray) -> None:
    sides: dict[str, Callable[[int], tuple[Tables, int, float, float]]] = {
        f"gensim, {arguments.threads} workers": lambda seed: _gensim(arguments, method, text, seed),
        f"tinylm, {arguments.threads} threads": lambda seed: _ours(arguments, method, text, arguments.threads, seed),
        "tinylm, 1 thread": lambda seed: _ours(arguments, method, text, 1, seed),
    }
    rates: dict[str, list[float]] = {side: [] for side in sides}
    first = next(iter(sides))
    for seed in range(1, arguments.rounds + 1):
        for side, run in sides.items():
            tables, tokens, wall, processor = run(seed)
            rates[side].append(tokens / wall)
            ratio = rates[side][-1] / rates[first][-1]
            print(
                f"{method} {side:18} {tokens / wall:9,.0f} tokens/s ({ratio:.2f} x), {tokens / processor:9,.0f} a CPU second, "
                f"held-out loss {_heldout_loss(*tables, heldout, text.units.counts):.4f}, "  # type: ignore[attr-defined]
                f"plurals {_plurals(tables[0], text.units.names):.1%}",  # type: ignore[attr-defined]
                flush=True,
            )
    for side, found in rates.items():
        print(f"{method} {side:18} median {median(found) / median(rates[first]):.2f} x gensim")


def _timed(work: Callable[[], None]) -> tuple[float, float]:
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - processor


def _gensim(arguments: argparse.Namespace, method: str, text: object, seed: int) -> tuple[Tables, int, float, float]:
    from gensim.models import Word2Vec

    ids = text.read(0, text.length)  # type: ignore[attr-defined]
    names = text.units.names  # type: ignore[attr-defined]
    ends = [*np.flatnonzero(ids < 0).tolist(), len(ids)]
    sentences = [
        [names[id] for id in ids[start : min(start + PIECE, end)]]
        for begin, end in zip([0, *[end + 1 for end in ends]], ends, strict=False)
        for start in range(begin, end, PIECE)
    ]
    model = Word2Vec(
        vector_size=100,
        window=5,
        negative=5,
        sample=1e-3,
        min_count=1,
        sg=int(method == "skipgram"),
        workers=arguments.threads,
        alpha=0.025 if method == "skipgram" else 0.05,
        min_alpha=1e-4,
        seed=seed,
    )
    model.build_vocab(sentences)
    wall, processor = _timed(lambda: model.train(sentences, total_examples=model.corpus_count, epochs=arguments.epochs))
    rows = [model.wv.key_to_index[name] for name in names]
    return (model.wv.vectors[rows], model.syn1neg[rows]), len(ids) * arguments.epochs, wall, processor


def _ours(arguments: argparse.Namespace, method: str, text: object, threads: int, seed: int) -> tuple[Tables, int, float, float]:
    from tinylm.embedding.word2vec import Word2Vec
    from tinylm.recipe.embeddings import CbowMethod, SkipGramMethod

    section = {"skipgram": SkipGramMethod, "cbow": CbowMethod}[method]
    learner = Word2Vec(text, section(name=method, epochs=arguments.epochs), seed, threads)  # type: ignore[arg-type]

    def work() -> None:
        for step in range(learner.steps):
            learner.step(step)

    wall, processor = _timed(work)
    learner.close()
    return (learner.inputs, learner.outputs), text.length * arguments.epochs, wall, processor  # type: ignore[attr-defined]


def _heldout_loss(inputs: np.ndarray, outputs: np.ndarray, ids: np.ndarray, counts: np.ndarray) -> float:
    """Nats per pair: a position and one within five of it in the same document, against five drawn negatives."""
    generator = np.random.default_rng(0)
    positions = generator.integers(0, len(ids) - 5, 200_000)
    distances = generator.integers(1, 6, len(positions))
    document = np.cumsum(ids < 0)
    first, second = ids[positions], ids[positions + distances]
    usable = (first >= 0) & (second >= 0) & (document[positions] == document[positions + distances])
    first, second = first[usable], second[usable]
    chances = np.cumsum(counts**0.75)
    negatives = np.searchsorted(chances, generator.random((len(first), 5)) * chances[-1])
    right = np.einsum("nd,nd->n", inputs[first], outputs[second])
    wrong = np.einsum("nd,nkd->nk", inputs[first], outputs[negatives])
    return float(np.logaddexp(0, -right).mean() + np.logaddexp(0, wrong).sum(axis=1).mean())


def _plurals(matrix: np.ndarray, names: list[str]) -> float:
    rows = {name: row for row, name in enumerate(names)}
    pairs = np.array([(row, rows[f"{name}s"]) for name, row in rows.items() if len(name) > 3 and f"{name}s" in rows][:1500])
    units = matrix / np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1e-30)
    scores = units[pairs[:, 0]] @ units.T
    scores[np.arange(len(pairs)), pairs[:, 0]] = -np.inf
    places = (scores > scores[np.arange(len(pairs)), pairs[:, 1]][:, None]).sum(axis=1)
    return float((places < 10).mean())


def memory(arguments: argparse.Namespace) -> None:
    from memory import write_text

    for megabytes in arguments.megabytes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "text.txt")
            write_text(path, megabytes)
            for method in arguments.methods:
                environment = {**os.environ, "TINYLM_CACHE": str(Path(folder, "cache"))}
                command = [sys.executable, "-c", TRAIN, str(path), method, str(Path(folder, method))]
                done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
                peak, names, tokens, seconds = done.stdout.split()
                print(f"{method}, {megabytes} MB: peak {peak} MiB; {names} names, {tokens} trained on, {seconds} s", flush=True)


def neighbours(arguments: argparse.Namespace) -> None:
    from tinylm.embedding.formats import read
    from tinylm.embedding_pipeline import train_embeddings
    from tinylm.recipe import EmbeddingRecipe, loads_any

    text = "kind: embeddings\ndata: {train: 'builtin:python-docs'}\nmethod: {epochs: 40}\ncheckpoint: {every: 0}\n"
    recipe = loads_any(text)
    assert isinstance(recipe, EmbeddingRecipe)
    with tempfile.TemporaryDirectory() as folder:
        vectors = read(Path(train_embeddings(recipe, Path(folder, "run")).vectors or ""))
    for probe in PROBES:
        print(f"{probe:10} {', '.join(one.token for one in vectors.nearest(probe, 6))}")
    generator = np.random.default_rng(0)
    chance = [_plurals(generator.standard_normal(vectors.matrix.shape), list(vectors.names)) for _ in range(20)]
    learned = _plurals(vectors.matrix, list(vectors.names))
    print(f"plural among the ten nearest: {learned:.1%}; random vectors {np.mean(chance):.2%}, at most {max(chance):.2%} of 20")


def reuse(arguments: argparse.Namespace) -> None:
    from tinylm.embedding_pipeline import train_embeddings
    from tinylm.pipeline import train
    from tinylm.recipe import EmbeddingRecipe, loads, loads_any
    from tinylm.run import Run

    base = f"""
data: {{train: 'builtin:python-docs'}}
tokenizer: {{kind: bpe, vocab_size: 4096}}
model: {{preset: {arguments.preset}, n_layer: 4, n_head: 4, n_embd: 128, context_length: 128}}
training: {{steps: {arguments.steps}, global_batch_size: 16, precision: fp32, compile: off}}
evaluation: {{every: {arguments.steps // 3}, max_tokens: 20000}}
checkpoint: {{every: {arguments.steps}}}
"""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train(loads(base, [f"training.steps={1}"]), folder / "tokenizer")
        heldin = _training_half(folder, base)
        shared = f"kind: embeddings\ndata: {{train: {heldin}}}\nmethod: {{name: skipgram, dimensions: 128, epochs: 20}}\n"
        sources = {"tokens": [f"vocabulary.tokenizer={folder / 'tokenizer'}"], "words": []}
        for kind, overrides in sources.items():
            recipe = loads_any(shared, overrides)
            assert isinstance(recipe, EmbeddingRecipe)
            train_embeddings(recipe, folder / kind)
        sides: dict[str, list[str]] = {
            "random": [],
            "tokens": [f"model.init_embeddings={folder / 'tokens'}"],
            "words": [f"model.init_embeddings={folder / 'words'}"],
            "tokens, frozen": [f"model.init_embeddings={folder / 'tokens'}", "model.freeze_embeddings=true"],
        }
        for seed in arguments.seeds:
            for side, overrides in sides.items():
                run = folder / f"{side}-{seed}"
                train(loads(base, [*overrides, f"seed={seed}"]), run)
                losses = [line["val_loss"] for line in Run.open(run).metrics() if line["kind"] == "eval"]
                print(f"seed {seed}  {side:15} held-out nats per token {'  '.join(f'{loss:.4f}' for loss in losses)}", flush=True)


def _training_half(folder: Path, base: str) -> Path:
    """The text that the model learns from, alone: vectors that had seen the held-out half would flatter."""
    from contextlib import ExitStack

    from tinylm.data.prepare import open_text
    from tinylm.recipe import loads
    from tinylm.reporting import SILENT

    path = folder / "train.txt"
    with ExitStack() as stack:
        text = open_text(loads(base).data, SILENT, stack)
        path.write_text("".join(piece.text for piece in text.pieces("train")), encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    verb = verbs.add_parser("speed")
    verb.add_argument("text", nargs="+")
    verb.add_argument("--methods", nargs="+", default=["skipgram", "cbow"])
    verb.add_argument("--rounds", type=int, default=3)
    verb.add_argument("--epochs", type=int, default=1)
    verb.add_argument("--threads", type=int, default=2)
    verb.set_defaults(run=speed)
    verb = verbs.add_parser("glove")
    verb.add_argument("text", nargs="+")
    verb.add_argument("--program", required=True)
    verb.add_argument("--rounds", type=int, default=2)
    verb.add_argument("--epochs", type=int, default=15)
    verb.add_argument("--threads", type=int, default=2)
    verb.set_defaults(run=glove)
    verb = verbs.add_parser("memory")
    verb.add_argument("--megabytes", type=int, nargs="+", default=[64, 1000])
    verb.add_argument("--methods", nargs="+", default=["skipgram"])
    verb.set_defaults(run=memory)
    verb = verbs.add_parser("neighbours")
    verb.set_defaults(run=neighbours)
    verb = verbs.add_parser("reuse")
    verb.add_argument("--steps", type=int, default=300)
    verb.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    verb.add_argument("--preset", default="modern")
    verb.set_defaults(run=reuse)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
