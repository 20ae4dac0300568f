"""Tokenizers read from tiktoken rank files, and exported to them, produce the ids of the tiktoken library."""

from __future__ import annotations

import base64
import random
import sys
from pathlib import Path

import pytest
from tokenizer.samples import odd_texts, train_on

from tinylm.errors import InputError
from tinylm.recipe import RecipeError, loads
from tinylm.recipe.schema import BpeTokenizer, UnigramTokenizer
from tinylm.text.sources import Piece
from tinylm.tokenizer import END_OF_TEXT, Tokenizer
from tinylm.tokenizer.exporting import export_tiktoken
from tinylm.tokenizer.pretokenizer import split_pattern


def write_ranks(path: Path, ranks: dict[bytes, int]) -> Path:
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()))
    return path


def random_ranks(seed: int) -> dict[bytes, int]:
    """Return a vocabulary that no BPE training would produce: some tokens cannot be reached by merging."""
    generator = random.Random(seed)
    tokens = {bytes(generator.choices(b"abc ", k=generator.randrange(2, 6))) for _ in range(60)}
    ordered = [bytes([byte]) for byte in range(256)] + generator.sample(sorted(tokens), len(tokens))
    ids = generator.sample(range(len(ordered) + 20), len(ordered)) if seed % 2 else range(len(ordered))
    return dict(zip(ordered, ids, strict=True))


@pytest.mark.parametrize("split", ["gpt2", "llama3"])
def test_ids_are_those_of_tiktoken(bpe: Tokenizer, english: str, tmp_path: Path, split: str) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {token: id for id, token in enumerate(bpe.token_bytes[:-1])}
    file = write_ranks(tmp_path / "a.tiktoken", ranks)
    reference = tiktoken.Encoding("a", pat_str=split_pattern(split, None), mergeable_ranks=ranks, special_tokens={})
    tokenizer = Tokenizer.load(f"{file}:{split}")
    for text in [english[60_000:160_000], *odd_texts(200)]:
        assert tokenizer.encode(text) == reference.encode_ordinary(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.end_of_text == len(ranks)
    assert tokenizer.end_of_text not in tokenizer.encode(f"a{END_OF_TEXT}b")


@pytest.mark.parametrize("seed", range(6))
def test_ids_are_those_of_tiktoken_for_vocabularies_without_a_merge_for_every_token(tmp_path: Path, seed: int) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    ranks = random_ranks(seed)
    pattern = r"[^ ]+| +"
    reference = tiktoken.Encoding("a", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    tokenizer = Tokenizer.load(f"{write_ranks(tmp_path / 'a.tiktoken', ranks)}:{pattern}")
    generator = random.Random(seed)
    for text in [token.decode() for token in list(ranks)[256:]] + ["".join(generator.choices("abc ", k=40)) for _ in range(200)]:
        assert tokenizer.encode(text) == reference.encode_ordinary(text)
    assert tokenizer.end_of_text == max(ranks.values()) + 1


def test_an_exported_tokenizer_is_loaded_by_tiktoken_and_read_back_unchanged(bpe: Tokenizer, english: str, tmp_path: Path) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    from tiktoken.load import load_tiktoken_bpe

    file = tmp_path / "mine.tiktoken"
    exported = export_tiktoken(bpe, file, [Piece(english[60_000:90_000], True)])
    assert exported.verified_with == ("tinylm", "tiktoken")
    assert exported.special_tokens == {END_OF_TEXT: bpe.end_of_text}
    assert exported.pattern == split_pattern("gpt4", None)
    ranks = load_tiktoken_bpe(str(file))
    reference = tiktoken.Encoding(
        "mine", pat_str=exported.pattern, mergeable_ranks=ranks, special_tokens=exported.special_tokens, explicit_n_vocab=800
    )
    for text in [english[90_000:120_000], *odd_texts(50)]:
        assert reference.encode_ordinary(text) == bpe.encode(text)
    read = Tokenizer.load(f"{file}:gpt4")
    assert (read.merge_ranks, read.backend.get_vocab()) == (bpe.merge_ranks, bpe.backend.get_vocab())


def test_without_tiktoken_an_export_is_checked_with_tinylm(
    bpe: Tokenizer, english: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    exported = export_tiktoken(bpe, tmp_path / "mine.tiktoken", [Piece(english[:1000], True)])
    assert exported.verified_with == ("tinylm",)
    assert exported.tokens_compared == len(bpe.encode(english[:1000]))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (UnigramTokenizer(kind="unigram", vocab_size=400), "only byte-level BPE tokenizers"),
        (BpeTokenizer(kind="bpe", vocab_size=400, alphabet=60), "only byte-level BPE tokenizers"),
        (BpeTokenizer(kind="bpe", vocab_size=400, normalize=("nfc",)), "does not normalize text"),
        (BpeTokenizer(kind="bpe", vocab_size=400, added_tokens=("self",)), "no added tokens except special tokens"),
        (BpeTokenizer(kind="bpe", vocab_size=400, digits=1, split="gpt2"), "by a single regular expression"),
    ],
)
def test_a_tokenizer_that_tiktoken_cannot_represent_is_rejected(
    section: BpeTokenizer | UnigramTokenizer, message: str, english: str, tmp_path: Path
) -> None:
    tokenizer = train_on(english[:20_000], section)
    with pytest.raises(InputError, match=message):
        export_tiktoken(tokenizer, tmp_path / "mine.tiktoken", [Piece("text", True)])
    assert not (tmp_path / "mine.tiktoken").exists()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("IQ== 0\n", r"a\.tiktoken: not a byte-level vocabulary: 255 of the 256 bytes are not tokens"),
        ("IQ== 0\nnonsense\n", r"a\.tiktoken:2: not a token in base64 and its id"),
        ("IQ== 0\nIQ== 1\n", r"a\.tiktoken:2: the token is repeated"),
        ("IQ== -1\n", r"a\.tiktoken:1: the id -1 is invalid"),
        ("IQ== 0\nIg== 0\n", r"a\.tiktoken: two tokens have the same id"),
    ],
)
def test_a_damaged_rank_file_is_rejected_with_the_line(lines: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.tiktoken").write_text(lines)
    with pytest.raises(InputError, match=message):
        Tokenizer.load(tmp_path / "a.tiktoken")


def test_an_invalid_split_is_rejected(tmp_path: Path) -> None:
    file = write_ranks(tmp_path / "a.tiktoken", {bytes([byte]): byte for byte in range(256)})
    with pytest.raises(InputError, match="is not a valid regular expression"):
        Tokenizer.load(f"{file}:(")


def test_a_recipe_can_name_a_rank_file_with_a_split(tmp_path: Path) -> None:
    file = write_ranks(tmp_path / "a.tiktoken", {bytes([byte]): byte for byte in range(256)})
    (tmp_path / "text.txt").write_text("some text\n" * 900)
    recipe = f"data: {{train: {tmp_path}/text.txt}}\ntraining: {{steps: 1}}\n"
    assert loads(f"{recipe}tokenizer: {{path: '{file}:gpt2'}}\n").tokenizer.kind == "file"
    with pytest.raises(RecipeError, match=r"tokenizer\.path: .*none\.tiktoken: no such file"):
        loads(f"{recipe}tokenizer: {{path: '{tmp_path}/none.tiktoken:gpt2'}}\n")
