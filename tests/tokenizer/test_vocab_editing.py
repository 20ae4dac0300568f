"""Adding or removing tokens does not change how other text is encoded."""

from __future__ import annotations

import pytest
from tokenizer.samples import SECTIONS

from tinylm.errors import InputError
from tinylm.text.sources import Piece
from tinylm.tokenizer import Tokenizer, training, vocab_editing


def test_added_tokens_do_not_change_the_encoding_of_other_text(tokenizer: Tokenizer, english: str) -> None:
    edited = vocab_editing.add(tokenizer, ["zebra!", "<|new|>"])
    size = tokenizer.vocab_size
    assert edited.tokenizer.vocab_size == size + 2
    assert edited.sources[size:] == [tokenizer.encode("zebra!"), tokenizer.encode("<|new|>")]
    text = english[:30_000] + "\na zebra! here\n"
    check = vocab_editing.check_encoding(tokenizer, edited, ["zebra!", "<|new|>"], [Piece(text, True)])
    assert check.unchanged == check.unaffected == check.lines - 1
    assert size in edited.tokenizer.encode("a zebra! here")
    with pytest.raises(InputError, match="is already in the vocabulary"):
        vocab_editing.add(edited.tokenizer, ["zebra!"])


def test_text_never_becomes_an_added_special_token(bpe: Tokenizer) -> None:
    edited = vocab_editing.add(bpe, ["<|user|>"], special=True).tokenizer
    assert edited.encode("<|user|>") == bpe.encode("<|user|>")
    assert edited.decode([edited.vocab_size - 1]) == ""


@pytest.mark.parametrize(
    ("kind", "token"), [("bpe", " the"), ("unigram", " the"), ("wordpiece", "##ing"), ("word", "the"), ("char", "q")]
)
def test_removing_a_token_does_not_change_the_encoding_of_other_text(kind: str, token: str, english: str) -> None:
    section = next(section for section in SECTIONS if section.kind == kind)
    before = training.train(section, [Piece(english[:60_000], True)], lambda warning: None)
    edited = vocab_editing.remove(before, [token])
    after = edited.tokenizer
    assert after.vocab_size == before.vocab_size - 1 - len(edited.also_removed)
    assert after.backend.token_to_id(token.replace(" ", "Ġ") if kind == "bpe" else token) is None
    assert after.backend.token_to_id("<|endoftext|>") == after.end_of_text
    check = vocab_editing.check_encoding(before, edited, [token], [Piece(english[:60_000], True)])
    assert check.unchanged == check.unaffected > 100
    assert check.unaffected < check.lines
    text = english[:20_000]
    if kind in ("bpe", "unigram"):
        assert after.decode(after.encode(text)) == text
        assert not any(after.token_bytes[id] == token.encode() for id in after.encode(text))


def test_tokens_built_from_a_removed_token_are_rebuilt_with_other_merges_or_removed() -> None:
    merges = [["a", "b"], ["b", "c"], ["ab", "c"], ["abc", "d"], ["ab", "d"]]
    vocabulary = {token: id for id, token in enumerate(["a", "b", "c", "d", "ab", "bc", "abc", "abcd", "abd"])}
    kept, removed = vocab_editing.repair_merges(merges, vocabulary, {"ab"})
    assert kept == [["b", "c"], ["a", "bc"], ["abc", "d"]]
    assert removed == {"ab", "abd"}


@pytest.mark.parametrize("token", ["x", "<|endoftext|>", "no such token", ""])
def test_removing_a_required_or_missing_token_is_an_error(bpe: Tokenizer, token: str) -> None:
    with pytest.raises(InputError, match=r"single byte|is required|is not in the vocabulary|must not be empty"):
        vocab_editing.remove(bpe, [token])
