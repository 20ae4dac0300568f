"""Cutting a text at its split points does not change its words."""

from __future__ import annotations

import json
import random
from itertools import pairwise

import pytest
import tokenizers
from tokenizer.samples import random_texts
from tokenizers import models

from tinylm.tokenizer import pretokenizer
from tinylm.tokenizer.pretokenizer import SPLIT_NAMES
from tinylm.tokenizer.split_points import split_points_of

TRICKY = " \t\n\r\v\f\x1c\x85\xa0\u2003\u2028\u3000\u180e\u0301'sS'tll0190.,:(){}<>-_aZéЖ語🙂\u0345\ufb01½"


def make_backend(split: str) -> tokenizers.Tokenizer:
    """Return a tokenizer with the pretokenizer for `split` and a placeholder model."""
    backend = tokenizers.Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    if split == "bert":
        backend.pre_tokenizer = pretokenizer.space_dropping_pretokenizer(split)
    else:
        steps = pretokenizer.split_steps(split, 2 if split == "gpt2" else None)
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(steps)
    return backend


@pytest.mark.parametrize("split", [*SPLIT_NAMES, "bert"])
def test_cutting_a_text_at_its_split_points_preserves_its_words(split: str, english: str) -> None:
    backend = make_backend(split)
    split_points = split_points_of(json.loads(backend.to_str()))
    assert split_points is not None
    rng = random.Random(11)
    texts = ["".join(rng.choices(TRICKY, k=rng.randint(1, 30))) for _ in range(3000)]
    n_cuts = 0
    for text in [*texts, *random_texts(200, english), english[:20_000]]:
        encoded = text.encode()
        cuts = [0, *split_points.find(encoded).tolist(), len(encoded)]
        n_cuts += len(cuts) - 2
        expected = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        words = [
            word for begin, end in pairwise(cuts) for word, _ in backend.pre_tokenizer.pre_tokenize_str(encoded[begin:end].decode())
        ]
        assert words == expected, repr(text)
    assert n_cuts > 300


def test_split_points_are_unknown_for_custom_patterns_tokens_with_spaces_and_replacements() -> None:
    backend = make_backend("gpt4")
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("a+"), "isolated")
    assert split_points_of(json.loads(backend.to_str())) is None
    backend = make_backend("gpt4")
    backend.add_tokens(["two words"])
    assert split_points_of(json.loads(backend.to_str())) is None
    backend = make_backend("gpt4")
    backend.normalizer = tokenizers.normalizers.Replace("a", " ")
    assert split_points_of(json.loads(backend.to_str())) is None
