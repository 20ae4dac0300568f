"""Benchmark word vectors: speed, quality, memory, nearest neighbors, and their use as initial embeddings of a language model.

    python benchmarks/embeddings.py speed TEXT... [--methods skipgram cbow] [--rounds 3] [--epochs 1] [--threads 2]
    python benchmarks/embeddings.py glove TEXT... --program FOLDER [--rounds 2] [--epochs 15] [--threads 2]
    python benchmarks/embeddings.py memory [--megabytes 64 1000]
    python benchmarks/embeddings.py neighbors
    python benchmarks/embeddings.py reuse [--steps 300] [--seeds 1 2 3]

`speed` compares tinylm's skip-gram and CBOW with gensim's. Both libraries train on the same ids, one document at a time. Building
the vocabulary is not timed. One document in 20 is held out, or the last twentieth of the text if it has fewer than 20 documents.
The held-out loss is the negative-sampling loss on the held-out text, with the same negatives for both libraries. `plurals` is the
percentage of words whose plural is among their ten nearest neighbors.

`glove` compares tinylm with the published C program (github.com/stanfordnlp/GloVe); `--program` is the folder with its binaries.
Both programs read the same words in the same documents. `memory` measures the peak memory of training on generated texts.
`neighbors` prints the nearest neighbors of example words. `reuse` trains language models with and without pretrained vectors.
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
    from tinylm.embedding.encoded_text import EncodedText

EXAMPLE_WORDS = ("list", "tuple", "string", "file", "socket", "thread", "exception", "integer", "directory", "bytes")
SENTENCE_LENGTH = 1000
"""Words per sentence for gensim, which truncates sentences at 10,000 words."""
TRAIN = """
import sys
from tinylm.embedding_pipeline import train_embeddings
from tinylm.recipe import loads_any
recipe = loads_any("kind: embeddings\\ndata: {train: %s}\\nmethod: {name: %s, epochs: 1}" % tuple(sys.argv[1:3]))
result = train_embeddings(recipe, sys.argv[3])
print(result.peak_memory_bytes >> 20, result.names, result.tokens, round(result.seconds))
"""

Tables = tuple[np.ndarray, np.ndarray]
"""Input and output vectors, each of shape (words, dimensions)."""


def _encode(sources: list[str]) -> EncodedText:
    from tinylm.embedding.encoded_text import encode_corpus
    from tinylm.recipe.embeddings import EmbeddingDataSection, WordVocabulary
    from tinylm.reporting import SILENT

    return encode_corpus(EmbeddingDataSection(train=tuple(sources)), WordVocabulary(kind="words"), SILENT)


def glove(arguments: argparse.Namespace) -> None:
    text = _encode(arguments.text)
    print(f"{text.length:,} tokens, {len(text.vocabulary.names):,} distinct words", flush=True)
    programs = {"C program": _train_glove_program, "tinylm": _train_tinylm_glove}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    for seed in range(1, arguments.rounds + 1):
        for name, train in programs.items():
            vectors, counting, training, cells = train(arguments, text, seed)
            seconds[name].append((counting, training))
            rate = cells * arguments.epochs / training
            plurals = _plurals(vectors, text.vocabulary.names)
            print(
                f"{name:14} counting {counting:5.1f} s, {cells:,} cells, {rate:11,.0f} cells/s, plurals {plurals:.1%}", flush=True
            )
    for part, name in enumerate(("counting", "training")):
        ratio = median(times[part] for times in seconds["C program"]) / median(times[part] for times in seconds["tinylm"])
        print(f"{name}: tinylm is {ratio:.2f} times as fast as the C program (medians)")


GloveResult = tuple[np.ndarray, float, float, int]
"""Vectors, time to count co-occurrences and training time in seconds, and the number of non-zero cells."""


def _train_glove_program(arguments: argparse.Namespace, text: EncodedText, seed: int) -> GloveResult:
    names, ids = text.vocabulary.names, text.read(0, text.length)
    with tempfile.TemporaryDirectory() as folder:
        words, pairs, shuffled, output = (Path(folder, name) for name in ("words", "pairs", "shuffled", "vectors"))
        vocabulary = "".join(f"{name} {count}\n" for name, count in zip(names, text.vocabulary.counts, strict=True))
        Path(folder, "vocabulary").write_text(vocabulary, encoding="utf-8")
        words.write_text(" ".join("\n" if id < 0 else names[id] for id in ids), encoding="utf-8")

        def run_program(name: str, source: Path | None, target: Path | None, **options: object) -> None:
            command = [str(Path(arguments.program, name)), "-verbose", "0", "-vocab-file", str(Path(folder, "vocabulary"))]
            command += [part for key, value in options.items() for part in (f"-{key.replace('_', '-')}", str(value))]
            with open(source or os.devnull, "rb") as stdin, open(target or os.devnull, "wb") as stdout:
                subprocess.run(command, stdin=stdin, stdout=stdout, stderr=subprocess.DEVNULL, check=True, cwd=folder)

        start = time.perf_counter()
        run_program("cooccur", words, pairs, window_size=15, memory=2)
        run_program("shuffle", pairs, shuffled, memory=2, seed=seed)
        counting = time.perf_counter() - start
        options = {"vector_size": 100, "iter": arguments.epochs, "threads": arguments.threads, "x_max": 100, "eta": 0.05}
        start = time.perf_counter()
        run_program("glove", None, None, input_file=shuffled, save_file=output, binary=0, seed=seed, **options)
        training = time.perf_counter() - start
        rows = {line.split(" ", 1)[0]: line for line in output.with_suffix(".txt").read_text(encoding="utf-8").splitlines()}
        vectors = np.array([np.fromstring(rows[name].split(" ", 1)[1], sep=" ") for name in names], np.float32)
        return vectors, counting, training, shuffled.stat().st_size // 16  # a cell is two ids and a value, in 16 bytes


def _train_tinylm_glove(arguments: argparse.Namespace, text: EncodedText, seed: int) -> GloveResult:
    from tinylm.embedding.glove import Glove
    from tinylm.recipe.embeddings import GloveMethod
    from tinylm.reporting import SILENT

    with tempfile.TemporaryDirectory() as cache:
        os.environ["TINYLM_CACHE"] = cache
        start = time.perf_counter()
        learner = Glove(text, GloveMethod(name="glove", epochs=arguments.epochs), seed, arguments.threads, SILENT)
        counting = time.perf_counter() - start
        start = time.perf_counter()
        for step in range(learner.steps):
            learner.step(step)
        training = time.perf_counter() - start
    return (learner.words + learner.contexts)[:, :-1], counting, training, len(learner.cells)


def speed(arguments: argparse.Namespace) -> None:
    from tinylm.embedding.encoded_text import EncodedText, Vocabulary

    full = _encode(arguments.text)
    ids = full.read(0, full.length)
    heldout, train = _hold_out(ids)
    counts = np.bincount(train[train >= 0], minlength=len(full.vocabulary.names))
    kept = counts >= 5
    new_ids = np.where(kept, np.cumsum(kept) - 1, -2)  # -2 marks rare words, which are removed below
    train, heldout = (np.where(split < 0, split, new_ids[split]) for split in (train, heldout))
    names = [name for name, keep in zip(full.vocabulary.names, kept, strict=True) if keep]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "ids")
        train = train[train != -2].astype("<i4")
        train.tofile(path)
        text = EncodedText(Vocabulary(names, counts[kept], False), path, len(train), "")
        print(f"{len(train):,} training tokens, {len(names):,} distinct words, {len(heldout):,} held-out tokens", flush=True)
        for method in arguments.methods:
            _compare_with_gensim(arguments, method, text, heldout[heldout != -2])


def _hold_out(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split ids into held-out and training ids.

    Every 20th document is held out, or the last 5% of the ids if there are fewer than 20 documents.
    """
    document = np.cumsum(ids < 0)  # document index of each id; a negative id ends a document
    is_heldout = document % 20 == 19 if document[-1] >= 19 else np.arange(len(ids)) >= 0.95 * len(ids)
    return ids[is_heldout], ids[~is_heldout]


def _compare_with_gensim(arguments: argparse.Namespace, method: str, text: EncodedText, heldout: np.ndarray) -> None:
    variants: dict[str, Callable[[int], tuple[Tables, int, float, float]]] = {
        f"gensim, {arguments.threads} workers": lambda seed: _train_gensim(arguments, method, text, seed),
        f"tinylm, {arguments.threads} threads": lambda seed: _train_tinylm(arguments, method, text, arguments.threads, seed),
        "tinylm, 1 thread": lambda seed: _train_tinylm(arguments, method, text, 1, seed),
    }
    rates: dict[str, list[float]] = {name: [] for name in variants}
    first = next(iter(variants))
    for seed in range(1, arguments.rounds + 1):
        for name, train in variants.items():
            tables, tokens, wall_seconds, cpu_seconds = train(seed)
            rates[name].append(tokens / wall_seconds)
            ratio = rates[name][-1] / rates[first][-1]
            print(
                f"{method} {name:18} {tokens / wall_seconds:9,.0f} tokens/s ({ratio:.2f} times gensim's speed), "
                f"{tokens / cpu_seconds:9,.0f} tokens per CPU second, "
                f"held-out loss {_heldout_loss(*tables, heldout, text.vocabulary.counts):.4f}, "
                f"plurals {_plurals(tables[0], text.vocabulary.names):.1%}",
                flush=True,
            )
    for name, values in rates.items():
        print(f"{method} {name:18} {median(values) / median(rates[first]):.2f} times gensim's speed (medians)")


def _measure_seconds(work: Callable[[], None]) -> tuple[float, float]:
    """Return the wall time and the CPU time of a call in seconds."""
    wall_start, cpu_start = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall_start, time.process_time() - cpu_start


def _train_gensim(arguments: argparse.Namespace, method: str, text: EncodedText, seed: int) -> tuple[Tables, int, float, float]:
    from gensim.models import Word2Vec

    ids = text.read(0, text.length)
    names = text.vocabulary.names
    ends = [*np.flatnonzero(ids < 0).tolist(), len(ids)]
    sentences = [
        [names[id] for id in ids[start : min(start + SENTENCE_LENGTH, end)]]
        for begin, end in zip([0, *[end + 1 for end in ends]], ends, strict=False)
        for start in range(begin, end, SENTENCE_LENGTH)
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
    seconds = _measure_seconds(lambda: model.train(sentences, total_examples=model.corpus_count, epochs=arguments.epochs))
    rows = [model.wv.key_to_index[name] for name in names]
    return (model.wv.vectors[rows], model.syn1neg[rows]), len(ids) * arguments.epochs, *seconds


def _train_tinylm(
    arguments: argparse.Namespace, method: str, text: EncodedText, threads: int, seed: int
) -> tuple[Tables, int, float, float]:
    from tinylm.embedding.word2vec import Word2Vec
    from tinylm.recipe.embeddings import CbowMethod, SkipGramMethod

    section = {"skipgram": SkipGramMethod, "cbow": CbowMethod}[method]
    learner = Word2Vec(text, section(name=method, epochs=arguments.epochs), seed, threads)

    def work() -> None:
        for step in range(learner.steps):
            learner.step(step)

    seconds = _measure_seconds(work)
    learner.close()
    return (learner.inputs, learner.outputs), text.length * arguments.epochs, *seconds


def _heldout_loss(inputs: np.ndarray, outputs: np.ndarray, ids: np.ndarray, counts: np.ndarray) -> float:
    """Return the negative-sampling loss in nats per word pair, with five random negatives per pair.

    The two words of a pair are in the same document, at most five words apart.
    """
    generator = np.random.default_rng(0)
    positions = generator.integers(0, len(ids) - 5, 200_000)
    distances = generator.integers(1, 6, len(positions))
    document = np.cumsum(ids < 0)
    first, second = ids[positions], ids[positions + distances]
    usable = (first >= 0) & (second >= 0) & (document[positions] == document[positions + distances])
    first, second = first[usable], second[usable]
    cumulative = np.cumsum(counts**0.75)
    negatives = np.searchsorted(cumulative, generator.random((len(first), 5)) * cumulative[-1])
    positive_scores = np.einsum("nd,nd->n", inputs[first], outputs[second])
    negative_scores = np.einsum("nd,nkd->nk", inputs[first], outputs[negatives])
    return float(np.logaddexp(0, -positive_scores).mean() + np.logaddexp(0, negative_scores).sum(axis=1).mean())


def _plurals(matrix: np.ndarray, names: list[str]) -> float:
    """Return the fraction of words whose plural is among their ten nearest neighbors."""
    rows = {name: row for row, name in enumerate(names)}
    pairs = np.array([(row, rows[f"{name}s"]) for name, row in rows.items() if len(name) > 3 and f"{name}s" in rows][:1500])
    units = matrix / np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1e-30)
    scores = units[pairs[:, 0]] @ units.T
    scores[np.arange(len(pairs)), pairs[:, 0]] = -np.inf
    ranks = (scores > scores[np.arange(len(pairs)), pairs[:, 1]][:, None]).sum(axis=1)
    return float((ranks < 10).mean())


def memory(arguments: argparse.Namespace) -> None:
    from memory import write_text

    for megabytes in arguments.megabytes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "text.txt")
            write_text(path, megabytes)
            for method in arguments.methods:
                environment = {**os.environ, "TINYLM_CACHE": str(Path(folder, "cache"))}
                command = [sys.executable, "-c", TRAIN, str(path), method, str(Path(folder, method))]
                process = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
                peak, names, tokens, seconds = process.stdout.split()
                print(
                    f"{method}, {megabytes} MB: peak {peak} MiB; {names} distinct words, {tokens} tokens, {seconds} s", flush=True
                )


def neighbors(arguments: argparse.Namespace) -> None:
    from tinylm.embedding.formats import read
    from tinylm.embedding_pipeline import train_embeddings
    from tinylm.recipe import EmbeddingRecipe, loads_any

    text = "kind: embeddings\ndata: {train: 'builtin:python-docs'}\nmethod: {epochs: 40}\ncheckpoint: {every: 0}\n"
    recipe = loads_any(text)
    assert isinstance(recipe, EmbeddingRecipe)
    with tempfile.TemporaryDirectory() as folder:
        vectors = read(Path(train_embeddings(recipe, Path(folder, "run")).vectors or ""))
    for word in EXAMPLE_WORDS:
        print(f"{word:10} {', '.join(neighbor.token for neighbor in vectors.nearest(word, 6))}")
    generator = np.random.default_rng(0)
    chance = [_plurals(generator.standard_normal(vectors.matrix.shape), list(vectors.names)) for _ in range(20)]
    trained = _plurals(vectors.matrix, list(vectors.names))
    random = f"mean {np.mean(chance):.2%}, maximum {max(chance):.2%} (20 draws)"
    print(f"words whose plural is among their ten nearest neighbors: {trained:.1%}; with random vectors: {random}")


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
        train(loads(base, ["training.steps=1"]), folder / "tokenizer")
        train_text = _write_training_text(folder, base)
        shared = f"kind: embeddings\ndata: {{train: {train_text}}}\nmethod: {{name: skipgram, dimensions: 128, epochs: 20}}\n"
        sources = {"tokens": [f"vocabulary.tokenizer={folder / 'tokenizer'}"], "words": []}
        for kind, overrides in sources.items():
            recipe = loads_any(shared, overrides)
            assert isinstance(recipe, EmbeddingRecipe)
            train_embeddings(recipe, folder / kind)
        variants: dict[str, list[str]] = {
            "random": [],
            "tokens": [f"model.init_embeddings={folder / 'tokens'}"],
            "words": [f"model.init_embeddings={folder / 'words'}"],
            "tokens, frozen": [f"model.init_embeddings={folder / 'tokens'}", "model.freeze_embeddings=true"],
        }
        for seed in arguments.seeds:
            for variant, overrides in variants.items():
                run = folder / f"{variant}-{seed}"
                train(loads(base, [*overrides, f"seed={seed}"]), run)
                losses = [line["val_loss"] for line in Run.open(run).metrics() if line["kind"] == "eval"]
                print(f"seed {seed}  {variant:15} held-out loss {'  '.join(f'{loss:.4f}' for loss in losses)}", flush=True)


def _write_training_text(folder: Path, base: str) -> Path:
    """Write the text without its held-out part, because vectors trained on the whole text would leak held-out data."""
    from contextlib import ExitStack

    from tinylm.data.split_text import open_text
    from tinylm.recipe import loads
    from tinylm.reporting import SILENT

    path = folder / "train.txt"
    with ExitStack() as stack:
        text = open_text(loads(base).data, SILENT, stack)
        path.write_text("".join(piece.text for piece in text.pieces("train")), encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("speed")
    command.add_argument("text", nargs="+")
    command.add_argument("--methods", nargs="+", default=["skipgram", "cbow"])
    command.add_argument("--rounds", type=int, default=3)
    command.add_argument("--epochs", type=int, default=1)
    command.add_argument("--threads", type=int, default=2)
    command.set_defaults(run=speed)
    command = commands.add_parser("glove")
    command.add_argument("text", nargs="+")
    command.add_argument("--program", required=True)
    command.add_argument("--rounds", type=int, default=2)
    command.add_argument("--epochs", type=int, default=15)
    command.add_argument("--threads", type=int, default=2)
    command.set_defaults(run=glove)
    command = commands.add_parser("memory")
    command.add_argument("--megabytes", type=int, nargs="+", default=[64, 1000])
    command.add_argument("--methods", nargs="+", default=["skipgram"])
    command.set_defaults(run=memory)
    command = commands.add_parser("neighbors")
    command.set_defaults(run=neighbors)
    command = commands.add_parser("reuse")
    command.add_argument("--steps", type=int, default=300)
    command.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    command.add_argument("--preset", default="modern")
    command.set_defaults(run=reuse)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
