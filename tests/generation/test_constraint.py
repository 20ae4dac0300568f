"""Expressions as automata over tokens: held against Python's own `re`."""

from __future__ import annotations

import random
import re

import pytest
import torch

from tinylm.errors import InputError
from tinylm.generation.constraint import Constraint
from tinylm.recipe.schema import ByteTokenizer, CharTokenizer
from tinylm.run import Run
from tinylm.text.sources import Piece
from tinylm.tokenizer import Tokenizer, training


@pytest.fixture(scope="module")
def by_bytes() -> Tokenizer:
    return training.train(ByteTokenizer(kind="byte"), iter([Piece("text", True)]), print)


def _accepts(constraint: Constraint, tokenizer: Tokenizer, text: str) -> bool:
    """Follow a text through the automaton, token by token, as the engine would allow it."""
    state, vocabulary = 0, tokenizer.vocab_size
    for id in tokenizer.encode(text):
        logits = torch.zeros(vocabulary)
        constraint.restrict(logits, state, 10_000)
        if logits[id] == float("-inf"):
            return False
        state = constraint.after(state, id)
    return constraint.accepts(state)


ALPHABET = "ab1 -é日\n"
PATTERNS = [
    "a*b?",
    "(ab|ba)+",
    "[a-b]{2,3}1",
    "[^ab]+",
    ".é?",
    r"\d+(-\d+)*",
    r"\w\s\w",
    r"\W\S?",
    "(?s).{1,2}",
    "(?:a|b1)*?-",
    "a{0}b{1,}",
    "[é日]|ab",
    "",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_it_accepts_what_re_accepts_and_nothing_else(pattern: str, by_bytes: Tokenizer) -> None:
    constraint, draw = Constraint(pattern, by_bytes), random.Random(pattern)
    texts = ["", "ab", "abab", "1-1", "a a", "é", "日b"]
    texts += ["".join(draw.choice(ALPHABET) for _ in range(draw.randint(1, 5))) for _ in range(150)]
    for text in texts:
        assert _accepts(constraint, by_bytes, text) == bool(re.fullmatch(pattern, text)), (pattern, text)


def test_the_shortest_match_is_counted_in_tokens(tiny_run: Run, by_bytes: Tokenizer) -> None:
    assert Constraint("the|zebra", by_bytes).fewest_tokens == 3
    known = tiny_run.tokenizer
    assert Constraint("zebra| statement", known).fewest_tokens == len(known.encode(" statement")) < 5
    assert Constraint("a*", by_bytes).fewest_tokens == 0
    assert Constraint.choices(["yes?", "a|b"], by_bytes).fewest_tokens == 3


def test_near_the_end_only_what_can_still_be_finished_is_allowed(by_bytes: Tokenizer) -> None:
    constraint = Constraint("a+bcd", by_bytes)
    a, b = by_bytes.encode("ab")
    state = constraint.after(0, a)
    for left, may_repeat in ((3, False), (4, True)):
        logits = torch.zeros(by_bytes.vocab_size)
        constraint.restrict(logits, state, left)
        assert (logits[a] == 0) == may_repeat
        assert logits[b] == 0


def test_characters_that_the_vocabulary_lacks_are_never_needed() -> None:
    letters = training.train(CharTokenizer(kind="char"), iter([Piece("abc", True)]), print)
    constraint = Constraint("(x|a)(b|y)c?", letters)
    assert constraint.fewest_tokens == 2
    with pytest.raises(InputError, match="no text that matches"):
        Constraint("[x-z]+", letters)


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("(", "not a regular expression"),
        (r"(a)\1", "back reference"),
        ("a(?=b)", "look-around"),
        ("a^b", "anchor"),
        ("(?i)a", "flags"),
        ("(a{900}){900}", "too large"),
        ("(a|b)*a(a|b){20}", "too large"),
    ],
)
def test_what_is_not_understood_is_said(pattern: str, told: str, by_bytes: Tokenizer) -> None:
    with pytest.raises(InputError, match=told) as caught:
        Constraint(pattern, by_bytes)
    assert caught.value.where == "--regex"
