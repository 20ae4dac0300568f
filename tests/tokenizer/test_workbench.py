"""Explaining, changing, comparing and sizing tokenizers, each against what the tokenizer itself does."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from tinylm.cost.plan import parameter_counts
from tinylm.errors import InputError
from tinylm.recipe import loads
from tinylm.recipe.schema import (
    BpeTokenizer,
    ByteTokenizer,
    CharTokenizer,
    LearnedTokenizer,
    UnigramTokenizer,
    WordPieceTokenizer,
    WordTokenizer,
)
from tinylm.text.sources import Piece
from tinylm.tokenizer import Tokenizer, editing, encoding, training
from tinylm.tokenizer.codec import open_codec
from tinylm.tokenizer.dropout import DropoutEncoder
from tinylm.tokenizer.explain import as_html, explain
from tinylm.tokenizer.report import report
from tinylm.tokenizer.sweep import sweep

SECTIONS: tuple[LearnedTokenizer, ...] = (
    BpeTokenizer(kind="bpe", vocab_size=800),
    BpeTokenizer(kind="bpe", vocab_size=900, alphabet=60),
    UnigramTokenizer(kind="unigram", vocab_size=900),
    WordPieceTokenizer(kind="wordpiece", vocab_size=700),
    WordTokenizer(kind="word", vocab_size=500),
    CharTokenizer(kind="char"),
    ByteTokenizer(kind="byte"),
)


@pytest.fixture(scope="module", params=SECTIONS, ids=lambda section: section.kind)
def tokenizer(request: pytest.FixtureRequest, english: str) -> Tokenizer:
    return training.train(request.param, [Piece(english[:60_000], True)], lambda warning: None)


@pytest.fixture(scope="module")
def bpe(english: str) -> Tokenizer:
    return training.train(SECTIONS[0], [Piece(english[:60_000], True)], pytest.fail)


def test_an_explanation_ends_in_the_tokens_that_encoding_gives(tokenizer: Tokenizer) -> None:
    text = "The statement explained: naïve 🙂 语 don't x<y  \n end"
    found = explain(tokenizer, text)
    assert [token.id for token in found.tokens] == tokenizer.encode(text)
    for word in found.words:
        assert word.steps
        last = word.steps[-1].parts if found.kind != "unigram" else word.steps[0].parts
        assert last == [token.text for token in word.tokens]


def test_the_merges_of_a_word_come_in_the_order_of_their_ranks(bpe: Tokenizer) -> None:
    (word,) = explain(bpe, " statement").words
    assert word.steps[0].what == "bytes"
    for before, after in pairwise(word.steps):
        assert len(after.parts) == len(before.parts) - 1
        assert "".join(after.parts) == " statement"


def test_the_best_path_of_a_unigram_word_has_the_best_score_of_all(english: str) -> None:
    unigram = training.train(SECTIONS[2], [Piece(english[:60_000], True)], pytest.fail)
    scores = dict(unigram.described["model"]["vocab"])
    for word in explain(unigram, "The statements are nested functions").words:

        def best(rest: str) -> float:
            ways = [scores[rest[:n]] + best(rest[n:]) for n in range(1, len(rest) + 1) if rest[:n] in scores]
            return max(ways, default=-np.inf) if rest else 0.0

        assert sum(token.score or 0 for token in word.tokens) == pytest.approx(best(word.text))
        told = [float(step.what.rpartition(" ")[2]) for step in word.steps]
        assert told == sorted(told, reverse=True)


def test_a_page_holds_the_text_and_nothing_that_a_browser_would_run(bpe: Tokenizer) -> None:
    page = as_html(explain(bpe, "<script>alert('x')</script> & more"), "title <b>")
    assert "<script" not in page
    assert "&lt;" in page
    assert "title &lt;b&gt;" in page
    assert page.count("<details") == len(explain(bpe, "<script>alert('x')</script> & more").words)


def test_added_tokens_change_nothing_else(tokenizer: Tokenizer, english: str) -> None:
    edited = editing.add(tokenizer, ["zebra!", "<|new|>"])
    size = tokenizer.vocab_size
    assert edited.tokenizer.vocab_size == size + 2
    assert edited.sources[size:] == [tokenizer.encode("zebra!"), tokenizer.encode("<|new|>")]
    proof = editing.prove(tokenizer, edited, ["zebra!", "<|new|>"], [Piece(english[:30_000] + "\na zebra! here\n", True)])
    assert proof.same == proof.without == proof.lines - 1
    assert size in edited.tokenizer.encode("a zebra! here")
    with pytest.raises(InputError, match="is a token already"):
        editing.add(edited.tokenizer, ["zebra!"])


def test_special_tokens_are_added_out_of_reach_of_text(bpe: Tokenizer) -> None:
    edited = editing.add(bpe, ["<|user|>"], special=True).tokenizer
    assert edited.encode("<|user|>") == bpe.encode("<|user|>")
    assert edited.decode([edited.vocab_size - 1]) == ""


@pytest.mark.parametrize(
    ("kind", "token"), [("bpe", " the"), ("unigram", " the"), ("wordpiece", "##ing"), ("word", "the"), ("char", "q")]
)
def test_text_without_a_removed_token_has_the_tokens_it_had(kind: str, token: str, english: str) -> None:
    section = next(section for section in SECTIONS if section.kind == kind)
    before = training.train(section, [Piece(english[:60_000], True)], lambda warning: None)
    edited = editing.remove(before, [token])
    after = edited.tokenizer
    assert after.vocab_size == before.vocab_size - 1 - len(edited.also_removed)
    assert after.backend.token_to_id(token.replace(" ", "Ġ") if kind == "bpe" else token) is None
    assert after.backend.token_to_id("<|endoftext|>") == after.end_of_text
    proof = editing.prove(before, edited, [token], [Piece(english[:60_000], True)])
    assert proof.same == proof.without > 100
    assert proof.without < proof.lines
    text = english[:20_000]
    if kind in ("bpe", "unigram"):
        assert after.decode(after.encode(text)) == text
        assert not any(after.token_bytes[id] == token.encode() for id in after.encode(text))


def test_longer_tokens_are_made_another_way_where_there_is_one_and_go_where_there_is_none() -> None:
    merges = [["a", "b"], ["b", "c"], ["ab", "c"], ["abc", "d"], ["ab", "d"]]
    gone_before = {"ab"}
    vocabulary = {token: id for id, token in enumerate(["a", "b", "c", "d", "ab", "bc", "abc", "abcd", "abd"])}
    kept, gone = editing._repaired(merges, vocabulary, gone_before)
    assert kept == [["b", "c"], ["a", "bc"], ["abc", "d"]]
    assert gone == {"ab", "abd"}


@pytest.mark.parametrize("token", ["x", "<|endoftext|>", "no such token", ""])
def test_what_cannot_be_removed_is_told(bpe: Tokenizer, token: str) -> None:
    with pytest.raises(InputError, match=r"single byte|cannot be missed|is no token|an empty token"):
        editing.remove(bpe, [token])


def test_dropout_gives_other_tokens_of_the_same_text_and_the_same_ones_for_the_same_seed(bpe: Tokenizer, english: str) -> None:
    text = english[:5000]
    pieces = [Piece(text, True)]

    def encoded(share: float, seed: int = 0, cut: int = 5000) -> list[int]:
        cuts = [Piece(text[at : at + cut], at == 0) for at in range(0, 5000, cut)]
        return [id for ids, _ in DropoutEncoder(bpe, share, seed).encode_pieces(cuts) for id in ids.tolist()]

    assert encoded(0.0) == bpe.encode(text)
    assert encoded(0.1, 1) == encoded(0.1, 1, cut=333) != encoded(0.1, 2)
    for share in (0.1, 0.5):
        assert bpe.decode(encoded(share)) == text
    assert len(bpe.encode(text)) < len(encoded(0.1)) < len(encoded(0.5)) < len(text.encode())
    assert len(pieces) == 1
    with pytest.raises(InputError, match="only kind bpe has merges"):
        DropoutEncoder(training.train(SECTIONS[-1], [], pytest.fail), 0.1)


def test_an_engine_that_gives_other_ids_is_given_up_with_a_note(bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    monkeypatch.setattr(encoding, "_tiktoken", lambda described, slow: lambda texts: [[0] for _ in texts])
    fresh = Tokenizer(tokenizers.Tokenizer.from_str(bpe.backend.to_str()))
    fresh.encoder.note = notes.append
    (ids, _) = next(fresh.encode_pieces([Piece("the for statement", True)]))
    assert ids.tolist() == bpe.encode("the for statement")
    assert notes == ["tiktoken gives other ids for this tokenizer: encoding with tokenizers, which is slower"]


def test_tiktoken_is_used_where_it_can_be_and_gives_the_same_ids(bpe: Tokenizer, english: str) -> None:
    pytest.importorskip("tiktoken")
    engine = encoding._tiktoken(bpe.described, lambda texts: [[-1] for _ in texts])
    assert engine is not None
    texts = english[:20_000].split("\n")
    assert engine(texts) == [found.ids for found in bpe.backend.encode_batch(texts, add_special_tokens=False)]
    assert engine(["x" * 501]) == [[-1]], "its time grows with the square of such a word"
    unigram = training.train(SECTIONS[2], [Piece("abc abd", True)], lambda _: None)
    assert encoding._tiktoken(unigram.described, engine) is None


def test_tokenizers_of_other_makers_are_measured_like_ours(bpe: Tokenizer, english: str, tmp_path: Path) -> None:
    tiktoken, sentencepiece = pytest.importorskip("tiktoken"), pytest.importorskip("sentencepiece")
    import base64

    bpe.save(tmp_path / "tokenizer.json")
    ranks = {token: id for id, token in enumerate(bpe.token_bytes[:-1])}
    lines = (f"{base64.b64encode(token).decode()} {rank}" for token, rank in ranks.items())
    (tmp_path / "ours.tiktoken").write_text("\n".join(lines) + "\n")
    prefix = str(tmp_path / "sp")
    (tmp_path / "text.txt").write_text(english[:50_000], encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(input=str(tmp_path / "text.txt"), model_prefix=prefix, vocab_size=500, minloglevel=2)
    files = [("text", [Piece(english[60_000:70_000], True)])]
    ours = report(open_codec(str(tmp_path)), files)
    theirs = report(open_codec(f"{tmp_path}/ours.tiktoken:gpt4"), files)
    assert tiktoken
    assert (theirs.kind, theirs.round_trip_failures) == ("tiktoken bpe", 0)
    # tiktoken's split has no choice of digits: gpt4 there groups as ours does
    assert theirs.tokens == ours.tokens
    pieces = report(open_codec(f"{prefix}.model"), files)
    assert pieces.kind == "sentencepiece"
    assert pieces.round_trip_failures > 0, "it collapses spaces, and says so"
    for path in ("none.model", "none.tiktoken", "none.json"):
        with pytest.raises(InputError, match="no such tokenizer file"):
            open_codec(str(tmp_path / path))


def test_words_split_and_failures_are_those_that_one_sees(english: str) -> None:
    words = training.train(WordTokenizer(kind="word", vocab_size=100, split="whitespace"), [Piece("aa bb cc " * 9, True)], print)
    found = report(words, [("one.txt", [Piece("aa bb\naa zz\n", True)]), ("two.txt", [Piece("cc", True)])])
    assert (found.words_split, found.unknown_tokens) == (0.0, 1)
    assert [(file.name, file.tokens, file.unknown_tokens) for file in found.files] == [("one.txt", 4, 1), ("two.txt", 1, 0)]
    assert found.round_trip_failures == 2, "both lines of the first file; their line feeds are lost"
    assert (found.failures[1].file, found.failures[1].line, found.failures[1].text) == ("one.txt", 2, "aa zz\n")
    byte = training.train(ByteTokenizer(kind="byte"), [], print)
    assert report(byte, [("a", [Piece("a bc d", True)])]).words_split == pytest.approx(1 / 3)


def test_a_sweep_measures_what_training_at_each_size_gives(english: str) -> None:
    train, heldout = [Piece(english[:60_000], True)], [Piece(english[60_000:70_000], True)]
    model = loads("data: {train: a}\ntraining: {steps: 1}\nmodel: {n_layer: 2, n_embd: 48}\n", check_files=False).model
    found = sweep(SECTIONS[0], [300, 600, 900], lambda: train, lambda: heldout, model, 1000, pytest.fail)  # type: ignore[arg-type]
    for size in found.sizes:
        alone = training.train(BpeTokenizer(kind="bpe", vocab_size=size.vocab_size), train, pytest.fail)
        tokens = len(alone.encode(heldout[0].text))
        assert size.bytes_per_token == pytest.approx(len(heldout[0].text.encode()) / tokens)
        assert size.bytes_per_step == pytest.approx(1000 * size.bytes_per_token)
        assert size.embedding_parameters == 2 * size.vocab_size * 48
        assert size.embedding_share == pytest.approx(
            size.embedding_parameters / sum(parameter_counts(model, size.vocab_size).values())
        )
    assert found.suggested in {300, 600, 900}
    assert "MFLOP" in found.reason or "more text" in found.reason


def test_a_text_that_is_no_text_is_told_early() -> None:
    warnings: list[str] = []
    training.train(BpeTokenizer(kind="bpe", vocab_size=260), [Piece("\x00\x01\x02\ufffd" * 3000, True)], warnings.append)
    assert "is this a binary file?" in warnings[0]
