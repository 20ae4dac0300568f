"""Measure the speed and memory of `tinylm prepare`, and how many planted duplicates it finds.

    python benchmarks/prepare.py speed [--gigabytes 0.05] [--jobs 1] [--engine builtin] [--keep FOLDER] [--seed 0]
    python benchmarks/prepare.py duplicates [--documents 2000] [--copies 300] [--minhash 14x8] [--seed 0]

`speed` writes a corpus of generated documents to a .jsonl file, prepares it, and prints the megabytes of text per second and the
peak resident memory (VmHWM) of every process. 5% of the documents repeat an earlier one, and 5% are edited copies.

`duplicates` adds edited copies of documents to a corpus, either with words replaced at random positions or with one passage
replaced, and prints the recall for each kind, the precision over all removed documents, and the recall that the similarity of each
pair predicts (1 - (1 - s^rows)^bands). The documents are made of real sentences, so that different documents share phrases.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tinylm.curation.minhash import MinHash, shingles
from tinylm.curation.preparation import Preparation
from tinylm.curation.settings import Settings
from tinylm.text.sources import Corpus

SOURCE = "builtin:python-docs"
EDITED_SHARES = (0.05, 0.10, 0.20)
SENTENCES, SENTENCE_WORDS, MEAN_SENTENCES = 100_000, 12, 33


def generated_sentences(random: np.random.Generator) -> np.ndarray:
    """Return sentences of random words with the frequencies of a real text, object (SENTENCES,)."""
    with Corpus([SOURCE]) as corpus:
        counts = collections.Counter(word for piece in corpus.pieces() for word in re.findall(r"[a-z]+", piece.text.lower()))
    words, frequencies = zip(*sorted(counts.items()), strict=True)
    chosen = random.choice(np.array(words, dtype=object), (SENTENCES, SENTENCE_WORDS), p=np.array(frequencies) / sum(frequencies))
    return np.array([f"{' '.join(row).capitalize()}." for row in chosen.tolist()], dtype=object)


def generated_documents(seed: int) -> Iterator[str]:
    """Yield documents of random sentences. Each paragraph has up to five sentences and contains a unique word."""
    random = np.random.default_rng(seed)
    sentences = generated_sentences(random)
    earlier: list[list[str]] = []
    while True:
        kind = random.random()
        if earlier and kind < 0.10:
            document = list(earlier[random.integers(len(earlier))])
            if kind < 0.05:
                document[random.integers(len(document))] = sentences[random.integers(SENTENCES)]
        else:
            count = 1 + int(random.lognormal(np.log(MEAN_SENTENCES), 0.6))
            document = sentences[random.integers(SENTENCES, size=count)].tolist()
            starts = range(0, count, 5)
            for start, number in zip(starts, random.integers(1 << 62, size=len(starts)).tolist(), strict=True):
                document[start] += f" It is {number:x}."
            if len(earlier) < 20_000:
                earlier.append(document)
        yield "\n\n".join(" ".join(document[start : start + 5]) for start in range(0, len(document), 5)) + "\n"


def edit(words: list[str], share: float, *, scattered: bool, random: np.random.Generator, vocabulary: np.ndarray) -> None:
    """Replace a share of the words, at random positions or in one passage."""
    count = round(share * len(words))
    start = int(random.integers(len(words) - count + 1))
    positions = random.choice(len(words), count, replace=False) if scattered else np.arange(start, start + count)
    for position, word in zip(positions.tolist(), random.choice(vocabulary, count).tolist(), strict=True):
        words[position] = word


def measure_speed(arguments: argparse.Namespace, folder: Path) -> None:
    """Prepare a generated corpus, and print the speed and the peak memory of every process."""
    source, size = folder / "corpus.jsonl", 0
    if not source.exists():
        with open(source, "w", encoding="utf-8") as file:
            for text in generated_documents(arguments.seed):
                size += len(text)
                file.write(json.dumps({"text": text}) + "\n")
                if size >= arguments.gigabytes * 1e9:
                    break
    command = [sys.executable, "-m", "tinylm", "prepare", str(source), "--out", str(folder / "out"), "--json", "--overwrite"]
    command += ["--jobs", str(arguments.jobs), "--engine", arguments.engine]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peaks: dict[int, int] = {}
    while process.poll() is None:
        for pid in [process.pid, *descendants(process.pid)]:
            peaks[pid] = max(peaks.get(pid, 0), peak_memory(pid))
        time.sleep(0.2)
    assert process.stdout is not None
    answer = json.loads(process.stdout.read())
    seconds = time.perf_counter() - start
    print(f"{'step':24} {'documents':>12} {'removed':>10} {'changed':>10} {'bytes removed':>14}")
    for step in answer["steps"]:
        if step["removed"] or step["changed"]:
            print(f"{step['step']:24} {step['documents']:12,} {step['removed']:10,} {step['changed']:10,} {step['bytes']:14,}")
    megabytes = answer["input"]["bytes"] / 1e6
    tokens = answer["parts"]["train"]["tokens"] + answer["parts"]["heldout"]["tokens"]
    print(f"{megabytes:,.0f} MB, {answer['input']['documents']:,} documents, {tokens:,} tokens")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = used.ru_utime + used.ru_stime
    print(f"{seconds:.0f} s, {megabytes / seconds:.2f} MB/s with {arguments.jobs} jobs")
    print(f"{cpu_seconds:.0f} s of CPU time, {megabytes / cpu_seconds:.2f} MB/s per core")
    for pid, peak in peaks.items():
        if peak > 1 << 25:  # smaller processes only track resources
            print(f"peak memory of {'the main process' if pid == process.pid else f'worker {pid}'}: {peak / 1e6:,.0f} MB")


def descendants(pid: int) -> list[int]:
    """Return the ids of the processes below a process."""
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [*children, *(descendant for child in children for descendant in descendants(child))]


def peak_memory(pid: int) -> int:
    """Return the peak resident memory of a process in bytes, or 0 if it has ended."""
    try:
        match = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(match[1]) * 1024 if match else 0


def measure_duplicates(arguments: argparse.Namespace, folder: Path) -> None:
    """Plant edited copies in a corpus, and print recall and precision."""
    random = np.random.default_rng(arguments.seed)
    with Corpus([SOURCE]) as corpus:
        text = "".join(piece.text for piece in corpus.pieces())
    sentences = np.array([s for s in re.split(r"(?<=[.!?])\s+", text) if 6 <= len(s.split()) <= 60], dtype=object)
    vocabulary = np.array(sorted(set(text.split())), dtype=object)
    originals = [" ".join(random.choice(sentences, int(random.integers(10, 60)))).split() for _ in range(arguments.documents)]
    kinds = [(share, scattered) for scattered in (False, True) for share in EDITED_SHARES]
    texts, planted = [" ".join(words) for words in originals], {}
    for kind in kinds:
        for index in random.choice(len(originals), arguments.copies, replace=False).tolist():
            words = list(originals[index])
            edit(words, kind[0], scattered=kind[1], random=random, vocabulary=vocabulary)
            planted[len(texts)] = (kind, index)
            texts.append(" ".join(words))
    source = folder / "corpus.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    bands, rows = map(int, arguments.minhash.split("x"))
    steps = ("gopher", "c4", "fineweb")
    settings = Settings((str(source),), without=steps, bands=bands, rows=rows)
    Preparation(settings, folder / "out").run(1, lambda report: None)
    removed = {entry["document"] for entry in map(json.loads, (folder / "out" / "removed.jsonl").open(encoding="utf-8"))}
    sets = [set(shingles(text).tolist()) for text in texts]
    print(f"{'words replaced':18} {'how':14} {'similarity':>10} {'recall':>8} {'predicted':>10}")
    for kind in kinds:
        pairs = [(number, index) for number, (its_kind, index) in planted.items() if its_kind == kind]
        similarity = np.array([len(sets[a] & sets[b]) / len(sets[a] | sets[b]) for a, b in pairs])
        recall = np.mean([number in removed for number, _ in pairs])
        predicted = np.mean([MinHash(bands, rows).probability(value) for value in similarity])
        name = "scattered" if kind[1] else "one passage"
        print(f"{kind[0]:<18.0%} {name:14} {similarity.mean():10.2f} {recall:8.1%} {predicted:10.1%}")
    correct = len(removed & planted.keys())
    print(f"precision {correct / max(len(removed), 1):.2%}: {correct:,} of {len(removed):,} removed documents were planted")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "duplicates"))
    parser.add_argument("--gigabytes", type=float, default=0.05)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--engine", default="builtin")
    parser.add_argument("--keep", help="Write the corpus and the result to this folder and keep them.")
    parser.add_argument("--documents", type=int, default=2000)
    parser.add_argument("--copies", type=int, default=300)
    parser.add_argument("--minhash", default="14x8")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.keep or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if arguments.what == "speed":
            measure_speed(arguments, folder)
        else:
            measure_duplicates(arguments, folder)


if __name__ == "__main__":
    main()
