"""Test that regular expressions compiled to token automata match the same texts as Python's `re`."""

from __future__ import annotations

import random
import re
import sys
import time

import pytest
import torch

from tinylm.errors import InputError
from tinylm.generation.automaton import CompileBudget, CompileTimeout
from tinylm.generation.constraint import Constraint
from tinylm.recipe.schema import ByteTokenizer, CharTokenizer
from tinylm.run import Run
from tinylm.text.sources import Piece
from tinylm.tokenizer import Tokenizer, training


@pytest.fixture(scope="module")
def byte_tokenizer() -> Tokenizer:
    return training.train(ByteTokenizer(kind="byte"), iter([Piece("text", True)]), print)


def _accepts(constraint: Constraint, tokenizer: Tokenizer, text: str) -> bool:
    """Return whether the automaton accepts a text, which is processed token by token, as in the engine."""
    state, vocabulary = 0, tokenizer.vocab_size
    for id in tokenizer.encode(text):
        logits = torch.zeros(vocabulary)
        constraint.mask_logits(logits, state, 10_000)
        if logits[id] == float("-inf"):
            return False
        state = constraint.next_state(state, id)
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
def test_a_constraint_accepts_the_same_texts_as_the_re_module(pattern: str, byte_tokenizer: Tokenizer) -> None:
    constraint, generator = Constraint(pattern, byte_tokenizer), random.Random(pattern)
    texts = ["", "ab", "abab", "1-1", "a a", "é", "日b"]
    texts += ["".join(generator.choice(ALPHABET) for _ in range(generator.randint(1, 5))) for _ in range(150)]
    for text in texts:
        assert _accepts(constraint, byte_tokenizer, text) == bool(re.fullmatch(pattern, text)), (pattern, text)


def test_min_tokens_is_the_length_of_the_shortest_match_in_tokens(tiny_run: Run, byte_tokenizer: Tokenizer) -> None:
    assert Constraint("the|zebra", byte_tokenizer).min_tokens == 3
    trained = tiny_run.tokenizer
    assert Constraint("zebra| statement", trained).min_tokens == len(trained.encode(" statement")) < 5
    assert Constraint("a*", byte_tokenizer).min_tokens == 0
    assert Constraint.choices(["yes?", "a|b"], byte_tokenizer).min_tokens == 3


def test_only_tokens_from_which_a_match_fits_in_max_tokens_are_allowed(byte_tokenizer: Tokenizer) -> None:
    constraint = Constraint("a+bcd", byte_tokenizer)
    a, b = byte_tokenizer.encode("ab")
    state = constraint.next_state(0, a)
    for max_tokens, may_repeat in ((3, False), (4, True)):
        logits = torch.zeros(byte_tokenizer.vocab_size)
        constraint.mask_logits(logits, state, max_tokens)
        assert (logits[a] == 0) == may_repeat
        assert logits[b] == 0


def test_alternatives_with_characters_that_are_not_in_the_vocabulary_are_dropped() -> None:
    letters = training.train(CharTokenizer(kind="char"), iter([Piece("abc", True)]), print)
    constraint = Constraint("(x|a)(b|y)c?", letters)
    assert constraint.min_tokens == 2
    with pytest.raises(InputError, match="cannot express any text"):
        Constraint("[x-z]+", letters)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "not a regular expression"),
        (r"(a)\1", "backreferences are not supported"),
        ("a(?=b)", "lookaround assertions are not supported"),
        ("a^b", "anchors inside the expression are not supported"),
        ("(?i)a", "flags"),
        ("(a{900}){900}", "too large"),
        ("(a|b)*a(a|b){20}", "too large"),
        ("(?:|){4294967294}", "too large"),
        ("(a?){9000}", "too large"),
        ("a?" * 9000, "too large"),
        ("a" * 20_001, "at most 20000 characters"),
        ("a{99999999999}", "not a regular expression"),
        ("(" * 3000 + "a" + ")" * 3000, "nested too deeply"),
        ("(?L)a", "not a regular expression"),
        ("a++", "possessive repetitions are not supported") if sys.version_info >= (3, 11) else ("(", "not a regular expression"),
    ],
)
def test_unsupported_patterns_are_rejected(pattern: str, message: str, byte_tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Constraint(pattern, byte_tokenizer)
    assert caught.value.where == "--regex"


def test_repetitions_of_the_empty_text_are_compiled_quickly_and_match_it(byte_tokenizer: Tokenizer) -> None:
    constraint = Constraint("(?:){4294967294}" * 8 + "a", byte_tokenizer)
    assert _accepts(constraint, byte_tokenizer, "a")
    assert not _accepts(constraint, byte_tokenizer, "")


def test_compilation_fails_after_its_deadline(byte_tokenizer: Tokenizer) -> None:
    with pytest.raises(CompileTimeout, match="--regex: the expression takes too long"):
        Constraint("[a-z]{1,2000}", byte_tokenizer, budget=CompileBudget("--regex", deadline=time.monotonic() - 1))


def test_a_large_automaton_keeps_few_transitions_in_memory(byte_tokenizer: Tokenizer) -> None:
    constraint = Constraint("[ -~]{0,300}", byte_tokenizer)
    assert _accepts(constraint, byte_tokenizer, "a" * 300)
    assert not _accepts(constraint, byte_tokenizer, "a" * 301)
    assert len(constraint._cache) <= 16
