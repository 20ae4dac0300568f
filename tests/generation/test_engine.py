"""Writing text: the cache changes nothing, seeds decide, stop texts stop, characters stay whole."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny import PRESETS, model

from tinylm.generation import engine
from tinylm.generation.engine import Sample, generate
from tinylm.generation.sampling import SamplingOptions
from tinylm.model.transformer import Transformer
from tinylm.recipe.schema import ByteTokenizer
from tinylm.run import Run
from tinylm.text.sources import Piece
from tinylm.tokenizer import Tokenizer, training


@pytest.fixture(scope="module")
def by_bytes() -> Tokenizer:
    return training.train(ByteTokenizer(kind="byte"), iter([Piece("text", True)]), print)


def _network(tokenizer: Tokenizer, preset: str = "modern", **parts: Any) -> Transformer:
    return model(preset, vocabulary=tokenizer.vocab_size, **parts)


def _greedy(tokens: int, **options: Any) -> SamplingOptions:
    return SamplingOptions(max_new_tokens=tokens, temperature=0.0, **options)


def _read_anew(network: Transformer, tokenizer: Tokenizer, prompt: str, tokens: int) -> list[int]:
    """Greedy writing without a cache: every token from a fresh pass. A full context goes on with its newer half."""
    context = network.model.context_length
    window = (tokenizer.encode(prompt) or [tokenizer.end_of_text])[-context:]
    written: list[int] = []
    while len(written) < tokens:
        with torch.no_grad():
            token = int(network(torch.tensor([window]))[0, -1].argmax())
        if token == tokenizer.end_of_text:
            break
        written.append(token)
        window = [*window, token]
        if len(window) > context:
            window = window[-max(1, context // 2) :]
    return written


@pytest.mark.parametrize("prompt", ["", "a", "the cat", "exactly sixteen!", "a prompt that is longer than the context"])
@pytest.mark.parametrize("preset", PRESETS)
def test_greedy_text_is_that_of_reading_everything_anew(preset: str, prompt: str, by_bytes: Tokenizer) -> None:
    network = _network(by_bytes, preset)
    [sample] = generate(network, by_bytes, prompt, _greedy(45))
    assert sample.token_ids == _read_anew(network, by_bytes, prompt, 45)
    assert len(set(sample.token_ids)) > 1


@pytest.mark.parametrize(
    "parts",
    [
        {"ngram_embeddings": [2, 4], "ngram_rows": 97},
        {"value_embeddings": 1, "value_residual": True},
        {"embedding_shortcut": True, "logit_softcap": 3.0},
        {"norm_gain": False, "qk_gain": False},
    ],
    ids=str,
)
def test_so_is_that_of_every_part_of_a_model(parts: dict[str, Any], by_bytes: Tokenizer) -> None:
    network = _network(by_bytes, **parts)
    for prompt in ("the cat", "exactly sixteen!"):
        [sample] = generate(network, by_bytes, prompt, _greedy(45))
        assert sample.token_ids == _read_anew(network, by_bytes, prompt, 45)
        assert len(set(sample.token_ids)) > 1


def test_samples_that_share_a_prompt_have_n_grams_of_their_own(by_bytes: Tokenizer) -> None:
    network, options = _network(by_bytes, ngram_embeddings=[2, 3], ngram_rows=97), SamplingOptions(max_new_tokens=40)
    among = generate(network, by_bytes, "seed", options, seed=3, count=3)
    alone = [generate(network, by_bytes, "seed", options, seed=3, count=count)[-1] for count in (1, 2, 3)]
    assert [sample.token_ids for sample in among] == [sample.token_ids for sample in alone]


@pytest.mark.parametrize("parts", [{"n_kv_head": 1}, {"context_length": 1}, {"context_length": 2}, {"context_length": 15}], ids=str)
def test_so_is_that_of_shared_heads_and_odd_contexts(parts: dict[str, Any], by_bytes: Tokenizer) -> None:
    network = _network(by_bytes, "llama", **parts)
    [sample] = generate(network, by_bytes, "hello", _greedy(40))
    assert sample.token_ids == _read_anew(network, by_bytes, "hello", 40)


def test_no_position_is_read_more_than_about_twice(by_bytes: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    network = _network(by_bytes, "gpt2")
    read = []
    hidden = network.hidden
    monkeypatch.setattr(network, "hidden", lambda tokens, cache=None: read.append(tokens.shape[1]) or hidden(tokens, cache))
    generate(network, by_bytes, "prompt", _greedy(100))
    assert sum(read) <= 2 * 106


def test_a_seed_writes_the_same_alone_and_among_others_streamed_or_not(by_bytes: Tokenizer) -> None:
    network, options = _network(by_bytes), SamplingOptions(max_new_tokens=40, temperature=1.0)
    alone = generate(network, by_bytes, "seed", options, seed=3)[0]
    among = generate(network, by_bytes, "seed", options, seed=3, count=4)
    streamed = generate(network, by_bytes, "seed", options, seed=3, on_text=lambda index, text: None)[0]
    assert among[0].token_ids == alone.token_ids == streamed.token_ids
    assert len({tuple(sample.token_ids) for sample in among}) == 4
    assert generate(network, by_bytes, "seed", options, seed=4)[0].token_ids != alone.token_ids


def test_the_global_random_state_decides_nothing_and_is_left_alone(by_bytes: Tokenizer) -> None:
    network, options = _network(by_bytes), SamplingOptions(max_new_tokens=20)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = generate(network, by_bytes, "x", options)[0].token_ids
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert generate(network, by_bytes, "x", options)[0].token_ids == first


def test_a_strong_penalty_lets_no_token_of_prompt_or_text_come_again(by_bytes: Tokenizer) -> None:
    network = _network(by_bytes)
    [sample] = generate(network, by_bytes, "the prompt", _greedy(40, repetition_penalty=1e9))
    both = [*sample.token_ids, *set(by_bytes.encode("the prompt"))]
    assert len(both) == len(set(both))


def test_nothing_is_written_when_no_token_is_allowed(by_bytes: Tokenizer) -> None:
    [sample] = generate(_network(by_bytes), by_bytes, "x", _greedy(0))
    assert (sample.text, sample.token_ids, sample.finish_reason) == ("", [], "length")


def test_a_trained_model_writes_from_an_empty_prompt(tiny_run: Run) -> None:
    network = tiny_run.network(tiny_run.checkpoint(), torch.device("cpu"))
    [sample] = generate(network, tiny_run.tokenizer, "", SamplingOptions(max_new_tokens=50))
    assert sample.text == tiny_run.tokenizer.decode(sample.token_ids)
    assert sample.finish_reason in ("length", "end")
    assert sample.tokens_per_second > 0


# What follows dictates the tokens, so that what is made of them can be known beforehand.


class _Dictated:
    """Stands in for `choose`: row i gets the ids of `texts[i]`, then end of text."""

    def __init__(self, tokenizer: Tokenizer, *texts: bytes | str) -> None:
        table = {text: id for id, text in enumerate(tokenizer.token_bytes) if len(text) == 1}
        encoded = [text.encode() if isinstance(text, str) else text for text in texts]
        end = tokenizer.end_of_text
        self._rows: list[Iterator[int]] = [
            itertools.chain((table[bytes([byte])] for byte in text), itertools.repeat(end)) for text in encoded
        ]

    def __call__(self, logits: torch.Tensor, *_: object) -> torch.Tensor:
        return torch.tensor([next(row) for row in self._rows])


@pytest.fixture
def dictate(by_bytes: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Any:
    """(samples, streamed pieces of each) of dictated texts."""
    network = _network(by_bytes)

    def written(*texts: bytes | str, tokens: int = 200, stop: tuple[str, ...] = ()) -> tuple[list[Sample], list[list[str]]]:
        monkeypatch.setattr(engine, "choose", _Dictated(by_bytes, *texts))
        pieces: list[list[str]] = [[] for _ in texts]
        options = SamplingOptions(max_new_tokens=tokens, stop=stop)
        samples = generate(
            network, by_bytes, "p", options, count=len(texts), on_text=lambda index, text: pieces[index].append(text)
        )
        return samples, pieces

    return written


@pytest.mark.parametrize(
    ("text", "stop", "expected", "reason"),
    [
        ("one STOP two", ("STOP",), "one ", "stop"),
        ("one STO two", ("STOP",), "one STO two", "end"),
        ("SSTOP", ("STOP",), "S", "stop"),
        ("STSTOP", ("STOP",), "ST", "stop"),
        ("ababac", ("abac",), "ab", "stop"),
        ("STOP", ("STOP",), "", "stop"),
        ("a\n\nb", ("\n\n",), "a", "stop"),
        ("xEND y", ("STOP", "END", "y"), "x", "stop"),
        ("abcd", ("bc", "abc"), "", "stop"),
        ("abXYZ", ("XYZ!", "YZ"), "abX", "stop"),
        ("naïve → fin", ("→",), "naïve ", "stop"),
        ("nothing", ("absent",), "nothing", "end"),
        ("ends in ST", ("STOP",), "ends in ST", "end"),
    ],
)
def test_a_stop_text_ends_the_sample_before_it_and_never_shows(
    text: str, stop: tuple[str, ...], expected: str, reason: str, dictate: Any
) -> None:
    """Every token is one byte, so that each stop text crosses the border of tokens."""
    [sample], [pieces] = dictate(text, stop=stop)
    assert (sample.text, sample.finish_reason) == (expected, reason)
    assert "".join(pieces) == expected


def test_text_is_streamed_as_soon_as_no_stop_text_can_take_it_back(dictate: Any) -> None:
    _, [pieces] = dictate("abSTx", stop=("STOP",))
    assert pieces == ["a", "b", "STx"]


@pytest.mark.parametrize("text", ["naïve café", "日本語のテキスト", "🦊 and 🐍", "e\u0301 is two"])
def test_streamed_characters_are_whole(text: str, dictate: Any) -> None:
    [sample], [pieces] = dictate(text)
    assert pieces == list(text)
    assert sample.text == text


def test_bytes_that_are_no_utf8_become_replacement_characters(dictate: Any) -> None:
    [sample], [pieces] = dictate(b"a\xffb\xe6\x97")
    assert sample.text == "a\ufffdb\ufffd"
    assert "".join(pieces) == sample.text


def test_a_character_cut_by_the_length_is_told_as_such(dictate: Any) -> None:
    [sample], [pieces] = dictate("a日", tokens=2)
    assert (sample.text, sample.finish_reason) == ("a\ufffd", "length")
    assert "".join(pieces) == sample.text


def test_samples_of_a_batch_end_each_at_its_own_time(dictate: Any) -> None:
    samples, pieces = dictate("short", "a longer text", "stops HERE and not there", stop=("HERE",))
    assert [sample.text for sample in samples] == ["short", "a longer text", "stops "]
    assert [sample.finish_reason for sample in samples] == ["end", "end", "stop"]
    assert ["".join(shown) for shown in pieces] == [sample.text for sample in samples]


def test_the_end_of_text_is_no_part_of_the_sample(dictate: Any, by_bytes: Tokenizer) -> None:
    [sample], _ = dictate("done")
    assert by_bytes.end_of_text not in sample.token_ids
    assert by_bytes.decode(sample.token_ids) == sample.text == "done"
