"""The tokenizers against their peers: encoding, training, round trip, determinism, compression. Both sides in turn, ratios printed.

python benchmarks/tokenizer_workbench.py FOLDER_OR_FILE [--only encode train roundtrip determinism compression] [--rounds 3]

Needs tiktoken, rustbpe and sentencepiece (`pip install tiktoken rustbpe sentencepiece`); the text should be 13 MB or more.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from tinylm.recipe.schema import BpeTokenizer, ByteTokenizer, LearnedTokenizer, UnigramTokenizer
from tinylm.text.sources import Corpus, Piece
from tinylm.tokenizer import Tokenizer, compiled, encoding, training
from tinylm.tokenizer.splits import pattern_of

VOCABULARY = 8192
PLANES = [(0x00, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x20000), (0x20000, 0x110000)]


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def in_turn(sides: dict[str, Callable[[], object]], rounds: int, size: int) -> None:
    """Each side once a round; medians, and ratios of the first side to the others."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, work in sides.items():
            seconds[name].append(timed(work))
    first = next(iter(sides))
    for name, times in seconds.items():
        ratios = [other / own for own, other in zip(seconds[first], times, strict=True)]
        median = statistics.median(times)
        print(
            f"  {name:<34} {median:6.2f} s {size / 1e6 / median:7.2f} MB/s   {first} is {statistics.median(ratios):.2f} x as fast"
        )


def encode(pieces: list[Piece], size: int, rounds: int) -> None:
    """13 MB by 8192 tokens: a fresh cache every round."""
    trained = training.train(BpeTokenizer(kind="bpe", vocab_size=VOCABULARY), pieces, print)
    texts = [piece.text for piece in pieces]
    described = trained.described
    pattern = pattern_of("gpt4", None)
    import tiktoken

    ranks = {token: id for id, token in enumerate(trained.token_bytes[:-1])}
    theirs = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    def ours(engine: bool) -> list[np.ndarray]:
        kept = encoding._tiktoken
        try:
            if not engine:
                encoding._tiktoken = lambda described, slow: None  # type: ignore[assignment]
            fresh = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(described)))
            return [ids for ids, _ in fresh.encode_pieces(pieces)]
        finally:
            encoding._tiktoken = kept

    expected = np.concatenate([np.array(found.ids) for found in trained.backend.encode_batch(texts, add_special_tokens=False)])
    whole = np.concatenate([ids for ids, _ in trained.encode_pieces([Piece(p.text, p.starts_document) for p in pieces])])
    print(f"encoding {size / 1e6:.1f} MB: ids identical to tokenizers: {np.array_equal(expected, whole)}")
    cores = os.cpu_count() or 1
    in_turn(
        {
            "tinylm with tiktoken": lambda: ours(True),
            "tinylm without it": lambda: ours(False),
            "tokenizers encode_batch": lambda: trained.backend.encode_batch(texts, add_special_tokens=False),
            "tokenizers encode_batch_fast": lambda: trained.backend.encode_batch_fast(texts, add_special_tokens=False),
            f"tiktoken, {cores} threads": lambda: theirs.encode_ordinary_batch(texts, num_threads=cores),
        },
        rounds,
        size,
    )


def train(pieces: list[Piece], size: int, rounds: int) -> None:
    import rustbpe

    texts = [piece.text for piece in pieces]
    pattern = pattern_of("gpt4", None)

    def theirs() -> list[list[str]]:
        backend = tokenizers.Tokenizer(models.BPE())
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        backend.train_from_iterator(
            texts, trainers.BpeTrainer(vocab_size=VOCABULARY - 1, initial_alphabet=alphabet, show_progress=False, special_tokens=[])
        )
        return list(json.loads(backend.to_str())["model"]["merges"])

    section = BpeTokenizer(kind="bpe", vocab_size=VOCABULARY, max_megabytes=10_000)
    same = training.train(section, pieces, print).described["model"]["merges"] == theirs()
    print(f"training on {size / 1e6:.1f} MB: merges identical to those of tokenizers: {same}")
    words = training.count(section, pieces, print)
    in_turn(
        {
            "tinylm": lambda: training.train(section, pieces, print),
            "  of it, counting words": lambda: training.count(section, pieces, print),
            "  of it, learning merges": lambda: training.learn(section, words),
            "tokenizers": theirs,
            "rustbpe": lambda: rustbpe.Tokenizer().train_from_iterator(iter(texts), VOCABULARY, pattern=pattern),
        },
        rounds,
        size,
    )


def roundtrip(pieces: list[Piece], size: int, rounds: int) -> None:
    """100 000 random strings, and the text itself, through every lossless kind."""
    drawn = random.Random(1)
    special = ["<|endoftext|>", "<|unknown|>", "<0x41>", "</s>", "▁", "Ġ", "\ufffd"]
    strings = []
    for _ in range(100_000):
        parts = [drawn.choice(special) if drawn.random() < 0.2 else "" for _ in range(2)]
        parts += [chr(drawn.randrange(*drawn.choice(PLANES))) for _ in range(drawn.randint(0, 12))]
        drawn.shuffle(parts)
        strings.append("".join(parts))
    kinds: dict[str, LearnedTokenizer] = {
        "bpe": BpeTokenizer(kind="bpe", vocab_size=VOCABULARY),
        "bpe of characters": BpeTokenizer(kind="bpe", vocab_size=VOCABULARY, alphabet=200),
        "unigram": UnigramTokenizer(kind="unigram", vocab_size=VOCABULARY),
        "byte": ByteTokenizer(kind="byte"),
    }
    sample = [Piece(text[:100_000], True) for piece in pieces[::10] for text in [piece.text]]
    for name, section in kinds.items():
        tokenizer = training.train(section, sample, lambda warning: None)
        failures = sum(tokenizer.decode(tokenizer.encode(text)) != text for text in strings)
        lost = sum(tokenizer.decode(tokenizer.encode(piece.text)) != piece.text for piece in pieces)
        print(f"  {name:<20} {failures} of {len(strings):,} strings and {lost} of {len(pieces)} pieces ({size / 1e6:.0f} MB) lost")


CHILD = """
import sys, hashlib
from tinylm.recipe import loads
from tinylm.text.sources import Corpus
from tinylm.tokenizer import training
section = loads("data: {train: a}\\ntraining: {steps: 1}\\ntokenizer: {kind: %s}" % sys.argv[2], check_files=False).tokenizer
with Corpus([sys.argv[1]]) as corpus:
    print(hashlib.sha256(training.train(section, corpus.pieces(), lambda w: None).backend.to_str().encode()).hexdigest()[:16])
"""


def determinism(source: str) -> None:
    for kind in ("bpe", "unigram", "wordpiece", "word", "char", "byte"):
        hashes = []
        for run in range(6):
            threads = str(1 + run % 3)
            more = {
                "RAYON_NUM_THREADS": threads,
                "OMP_NUM_THREADS": threads,
                "OPENBLAS_NUM_THREADS": threads,
                "PYTHONHASHSEED": str(run),
            }
            done = subprocess.run(
                [sys.executable, "-c", CHILD, source, kind], env={**os.environ, **more}, check=True, capture_output=True, text=True
            )
            hashes.append(done.stdout.strip())
        print(f"  {kind:<10} {len(set(hashes))} different of 6: {hashes[0]}", flush=True)


def compression(pieces: list[Piece], size: int) -> None:
    """Bytes per token on the last tenth, of vocabularies learned from the rest, line by line as sentencepiece reads."""
    import sentencepiece

    cut = len(pieces) * 9 // 10
    learned = [line for piece in pieces[:cut] for line in piece.text.splitlines() if line]
    heldout = [line for piece in pieces[cut:] for line in piece.text.splitlines() if line]
    total = sum(len(line.encode()) for line in heldout)
    for kind in ("unigram", "bpe"):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(learned),
            model_writer=model,
            vocab_size=VOCABULARY,
            model_type=kind,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            character_coverage=1.0,
            byte_fallback=True,
            max_sentence_length=1 << 20,
            minloglevel=2,
        )
        theirs = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
        section: LearnedTokenizer = (
            UnigramTokenizer(kind="unigram", vocab_size=VOCABULARY)
            if kind == "unigram"
            else BpeTokenizer(kind="bpe", vocab_size=VOCABULARY)
        )
        ours = training.train(section, pieces[:cut], lambda warning: None)
        a = total / sum(len(ours.encode(line)) for line in heldout)
        b = total / sum(map(len, theirs.encode(heldout)))
        print(f"  {kind:<8} tinylm {a:.3f}, sentencepiece {b:.3f} bytes per token: {a / b:.3f} x", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--only", nargs="+", default=["encode", "train", "roundtrip", "determinism", "compression"])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with Corpus([options.source]) as corpus:
        pieces = list(corpus.pieces())
    size = sum(len(piece.text.encode()) for piece in pieces)
    digest = hashlib.sha256("".join(piece.text for piece in pieces).encode()).hexdigest()[:12]
    print(f"{options.source}: {size:,} bytes in {len(pieces)} pieces, sha256 {digest}", flush=True)
    compiled.kernels(compiled.ENOUGH)  # loaded before the clock starts, as the other libraries are
    for name, work in (("encode", encode), ("train", train), ("roundtrip", roundtrip)):
        if name in options.only:
            print(name)
            work(pieces, size, options.rounds)
    if "determinism" in options.only:
        print("determinism")
        determinism(options.source)
    if "compression" in options.only:
        print("compression")
        compression(pieces, size)


if __name__ == "__main__":
    main()
