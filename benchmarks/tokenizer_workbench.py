"""Compare tinylm's tokenizers with those of other libraries: encoding and training speed, round trips, determinism, compression.

    python benchmarks/tokenizer_workbench.py FOLDER_OR_FILE [--only encode train roundtrip determinism compression] [--rounds 3]

The speed measurements of the libraries are interleaved. The script requires tiktoken, rustbpe and sentencepiece
(`pip install tiktoken rustbpe sentencepiece`). The text should be at least 13 MB.
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
from tinylm.tokenizer import Tokenizer, encoding, kernel_loading, training
from tinylm.tokenizer.pretokenizer import split_pattern

VOCABULARY = 8192
CODE_POINT_RANGES = [(0x00, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x20000), (0x20000, 0x110000)]


def measure_seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def benchmark(variants: dict[str, Callable[[], object]], rounds: int, size: int) -> None:
    """Run every variant once per round. Print the median times, and the speedup of the first variant over each variant."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, work in variants.items():
            seconds[name].append(measure_seconds(work))
    first = next(iter(variants))
    for name, times in seconds.items():
        ratios = [other / base for base, other in zip(seconds[first], times, strict=True)]
        median = statistics.median(times)
        print(
            f"  {name:<34} {median:6.2f} s {size / 1e6 / median:7.2f} MB/s   speedup of {first}: {statistics.median(ratios):.2f}x"
        )


def encode(pieces: list[Piece], size: int, rounds: int) -> None:
    """Encode with a vocabulary of 8192 tokens, starting every round with an empty cache."""
    trained = training.train(BpeTokenizer(kind="bpe", vocab_size=VOCABULARY), pieces, print)
    texts = [piece.text for piece in pieces]
    tokenizer_json = trained.tokenizer_json
    pattern = split_pattern("gpt4", None)
    import tiktoken

    ranks = {token: id for id, token in enumerate(trained.token_bytes[:-1])}
    tiktoken_encoding = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    def encode_with_tinylm(use_tiktoken: bool) -> list[np.ndarray]:
        original = encoding.tiktoken_engine
        try:
            if not use_tiktoken:
                encoding.tiktoken_engine = lambda tokenizer_json, fallback: None  # type: ignore[assignment]
            fresh = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json)))
            return [ids for ids, _ in fresh.encode_pieces(pieces)]
        finally:
            encoding.tiktoken_engine = original

    expected = np.concatenate([np.array(encoded.ids) for encoded in trained.backend.encode_batch(texts, add_special_tokens=False)])
    actual = np.concatenate([ids for ids, _ in trained.encode_pieces([Piece(p.text, p.starts_document) for p in pieces])])
    print(f"encoding {size / 1e6:.1f} MB: ids identical to tokenizers: {np.array_equal(expected, actual)}")
    cores = os.cpu_count() or 1
    benchmark(
        {
            "tinylm with tiktoken": lambda: encode_with_tinylm(True),
            "tinylm without tiktoken": lambda: encode_with_tinylm(False),
            "tokenizers encode_batch": lambda: trained.backend.encode_batch(texts, add_special_tokens=False),
            "tokenizers encode_batch_fast": lambda: trained.backend.encode_batch_fast(texts, add_special_tokens=False),
            f"tiktoken, {cores} threads": lambda: tiktoken_encoding.encode_ordinary_batch(texts, num_threads=cores),
        },
        rounds,
        size,
    )


def train(pieces: list[Piece], size: int, rounds: int) -> None:
    import rustbpe

    texts = [piece.text for piece in pieces]
    pattern = split_pattern("gpt4", None)

    def train_with_tokenizers() -> list[list[str]]:
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
    same = training.train(section, pieces, print).tokenizer_json["model"]["merges"] == train_with_tokenizers()
    print(f"training on {size / 1e6:.1f} MB: merges identical to tokenizers: {same}")
    words = training.count(section, pieces, print)
    benchmark(
        {
            "tinylm": lambda: training.train(section, pieces, print),
            "  counting words": lambda: training.count(section, pieces, print),
            "  learning merges": lambda: training.learn(section, words),
            "tokenizers": train_with_tokenizers,
            "rustbpe": lambda: rustbpe.Tokenizer().train_from_iterator(iter(texts), VOCABULARY, pattern=pattern),
        },
        rounds,
        size,
    )


def roundtrip(pieces: list[Piece], size: int, rounds: int) -> None:
    """Encode and decode 100,000 random strings and the text itself with every lossless kind of tokenizer."""
    rng = random.Random(1)
    special = ["<|endoftext|>", "<|unknown|>", "<0x41>", "</s>", "▁", "Ġ", "\ufffd"]
    strings = []
    for _ in range(100_000):
        parts = [rng.choice(special) if rng.random() < 0.2 else "" for _ in range(2)]
        parts += [chr(rng.randrange(*rng.choice(CODE_POINT_RANGES))) for _ in range(rng.randint(0, 12))]
        rng.shuffle(parts)
        strings.append("".join(parts))
    kinds: dict[str, LearnedTokenizer] = {
        "bpe": BpeTokenizer(kind="bpe", vocab_size=VOCABULARY),
        "bpe on characters": BpeTokenizer(kind="bpe", vocab_size=VOCABULARY, alphabet=200),
        "unigram": UnigramTokenizer(kind="unigram", vocab_size=VOCABULARY),
        "byte": ByteTokenizer(kind="byte"),
    }
    sample = [Piece(piece.text[:100_000], True) for piece in pieces[::10]]
    for name, section in kinds.items():
        tokenizer = training.train(section, sample, lambda warning: None)
        failures = sum(tokenizer.decode(tokenizer.encode(text)) != text for text in strings)
        failed_pieces = sum(tokenizer.decode(tokenizer.encode(piece.text)) != piece.text for piece in pieces)
        text = f"{failed_pieces} of {len(pieces)} pieces ({size / 1e6:.0f} MB)"
        print(f"  {name:<20} round trip failed for {failures} of {len(strings):,} strings and {text}")


TRAIN_AND_HASH = """
import sys, hashlib
from tinylm.recipe import loads
from tinylm.text.sources import Corpus
from tinylm.tokenizer import training
section = loads("data: {train: a}\\ntraining: {steps: 1}\\ntokenizer: {kind: %s}" % sys.argv[2], check_files=False).tokenizer
with Corpus([sys.argv[1]]) as corpus:
    print(hashlib.sha256(training.train(section, corpus.pieces(), lambda w: None).backend.to_str().encode()).hexdigest()[:16])
"""


def determinism(source: str) -> None:
    """Train every kind of tokenizer six times with different thread counts and hash seeds, and compare the results."""
    for kind in ("bpe", "unigram", "wordpiece", "word", "char", "byte"):
        hashes = []
        for run in range(6):
            threads = str(1 + run % 3)
            variables = {
                "RAYON_NUM_THREADS": threads,
                "OMP_NUM_THREADS": threads,
                "OPENBLAS_NUM_THREADS": threads,
                "PYTHONHASHSEED": str(run),
            }
            process = subprocess.run(
                [sys.executable, "-c", TRAIN_AND_HASH, source, kind],
                env={**os.environ, **variables},
                check=True,
                capture_output=True,
                text=True,
            )
            hashes.append(process.stdout.strip())
        print(f"  {kind:<10} {len(set(hashes))} distinct results in 6 runs: {hashes[0]}", flush=True)


def compression(pieces: list[Piece], size: int) -> None:
    """Compare bytes per token on the last tenth of the text, line by line. The vocabularies are trained on the rest."""
    import sentencepiece

    cut = len(pieces) * 9 // 10
    train_lines = [line for piece in pieces[:cut] for line in piece.text.splitlines() if line]
    heldout = [line for piece in pieces[cut:] for line in piece.text.splitlines() if line]
    total = sum(len(line.encode()) for line in heldout)
    for kind in ("unigram", "bpe"):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(train_lines),
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
        processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
        section: LearnedTokenizer = (
            UnigramTokenizer(kind="unigram", vocab_size=VOCABULARY)
            if kind == "unigram"
            else BpeTokenizer(kind="bpe", vocab_size=VOCABULARY)
        )
        tokenizer = training.train(section, pieces[:cut], lambda warning: None)
        tinylm_ratio = total / sum(len(tokenizer.encode(line)) for line in heldout)
        sentencepiece_ratio = total / sum(map(len, processor.encode(heldout)))
        ratio = tinylm_ratio / sentencepiece_ratio
        ratios = f"tinylm {tinylm_ratio:.3f}, sentencepiece {sentencepiece_ratio:.3f}, tinylm / sentencepiece {ratio:.3f}"
        print(f"  {kind:<8} bytes per token: {ratios}", flush=True)


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
    kernel_loading.kernels_if_worthwhile(kernel_loading.MIN_BYTES)  # load the kernels before timing
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
