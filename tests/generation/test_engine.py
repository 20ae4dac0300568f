"""Writing text: the cache changes nothing, seeds decide, stop texts stop, characters stay whole."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from tiny import PRESETS, model

from tinylm.generation.constraint import Constraint
from tinylm.generation.engine import Request, Sample, generate, sample_seed, write
from tinylm.generation.sampling import SamplingOptions
from tinylm.model.decoder import Decoder
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


@pytest.mark.parametrize("preset", PRESETS)
def test_so_is_that_of_compiled_steps(preset: str, by_bytes: Tokenizer) -> None:
    network = _network(by_bytes, preset, ngram_embeddings=[2, 4], ngram_rows=97)
    for prompt in ("the cat", "exactly sixteen!"):
        [sample] = generate(Decoder(network, compiled=True), by_bytes, prompt, _greedy(45))
        assert sample.token_ids == _read_anew(network, by_bytes, prompt, 45)


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
    decoder = Decoder(_network(by_bytes, "gpt2"))
    read, step, hidden = [], decoder.step, decoder.network.hidden
    monkeypatch.setattr(
        decoder.network, "hidden", lambda tokens, cache, last: read.append(tokens.shape[1]) or hidden(tokens, cache)[:, -1:]
    )
    monkeypatch.setattr(decoder, "step", lambda cache, tokens: read.append(1) or step(cache, tokens))
    generate(decoder, by_bytes, "prompt", _greedy(100))
    assert 105 <= sum(read) <= 2 * 106


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


PROMPTS = ["", "a", "the cat", "exactly sixteen!", "a prompt that is longer than the context", "b"]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("compiled", [False, True])
def test_prompts_of_any_length_are_written_together_as_each_alone(
    preset: str, rows: int, compiled: bool, by_bytes: Tokenizer
) -> None:
    decoder = Decoder(_network(by_bytes, preset), compiled=compiled)
    options = SamplingOptions(max_new_tokens=40, temperature=1.0)
    requests = [Request(prompt, options, seed) for seed, prompt in enumerate(PROMPTS * 2)]
    together = list(write(decoder, by_bytes, requests, rows=rows))
    alone = [next(write(decoder, by_bytes, [request])) for request in requests]
    assert [sample.prompt for sample in together] == PROMPTS * 2
    assert [sample.token_ids for sample in together] == [sample.token_ids for sample in alone]


@pytest.mark.parametrize("compiled", [False, True])
def test_requests_with_other_options_beside_them_are_not_changed(compiled: bool, by_bytes: Tokenizer) -> None:
    decoder = Decoder(_network(by_bytes), compiled=compiled)
    kinds = [
        SamplingOptions(max_new_tokens=30, temperature=1.0),
        _greedy(7),
        SamplingOptions(max_new_tokens=25, temperature=1.0, repetition_penalty=2.0, frequency_penalty=0.3),
        SamplingOptions(max_new_tokens=20, temperature=2.0, top_k=None, top_p=0.9, presence_penalty=1.0),
        SamplingOptions(max_new_tokens=20, temperature=1.0, logit_bias=((5, float("-inf")), (9, 2.0)), logprobs=2),
    ]
    requests = [Request("hello", options, seed) for seed, options in enumerate(kinds * 2)]
    together = [sample.token_ids for sample in write(decoder, by_bytes, requests, rows=4)]
    assert together == [next(write(decoder, by_bytes, [request])).token_ids for request in requests]


def test_sampled_first_tokens_have_the_frequencies_of_the_softmax(by_bytes: Tokenizer) -> None:
    """Pearson's chi-square over the engine as a whole; cells expected less than five times are one."""
    network, count = _network(by_bytes), 4000
    options = SamplingOptions(max_new_tokens=1, temperature=0.7, top_k=None)
    requests = [Request("the", options, sample_seed(5, index)) for index in range(count)]
    drawn = [sample.token_ids[0] for sample in write(network, by_bytes, requests, rows=500) if sample.token_ids]
    with torch.no_grad():
        logits = network(torch.tensor([by_bytes.encode("the")]))[0, -1].double() / 0.7
    expected = count * logits.softmax(-1)
    seen = torch.bincount(torch.tensor(drawn), minlength=len(expected)).double()
    seen[by_bytes.end_of_text] = count - len(drawn)
    common = expected >= 5
    cells = [(seen[common], expected[common]), (seen[~common].sum()[None], expected[~common].sum()[None])]
    square = sum(float(((a - b) ** 2 / b).sum()) for a, b in cells)
    degrees = int(common.sum())
    assert degrees > 20
    assert square < degrees + 4 * (2 * degrees) ** 0.5


def test_what_is_known_of_each_token_is_the_models_own_probability(by_bytes: Tokenizer) -> None:
    network = _network(by_bytes)
    options = SamplingOptions(max_new_tokens=8, temperature=2.0, top_k=40, logprobs=3, repetition_penalty=1.5)
    heard: list[int] = []
    request = Request("ab", options, seed=1, on_token=lambda choice: heard.append(choice.id))
    [sample] = write(network, by_bytes, [request])
    read = by_bytes.encode("ab")
    assert heard == sample.token_ids == [choice.id for choice in sample.choices]
    for choice in sample.choices:
        with torch.no_grad():
            logprobs = network(torch.tensor([read]))[0, -1].log_softmax(-1)
        assert choice.logprob == pytest.approx(float(logprobs[choice.id]), abs=1e-4)
        assert [id for id, _ in choice.alternatives] == logprobs.topk(3).indices.tolist()
        read.append(choice.id)


def test_banned_tokens_never_come_favored_ones_always_and_forced_ones_first(by_bytes: Tokenizer) -> None:
    network = _network(by_bytes)
    plain = generate(network, by_bytes, "x", _greedy(20))[0].token_ids
    banned = generate(network, by_bytes, "x", _greedy(20, logit_bias=tuple((id, float("-inf")) for id in set(plain))))[0]
    assert not set(plain) & set(banned.token_ids)
    assert generate(network, by_bytes, "x", _greedy(5, logit_bias=((17, 1e4),)))[0].token_ids == [17] * 5
    forced = generate(network, by_bytes, "x", _greedy(20, forced=tuple(by_bytes.encode("yes"))))[0]
    assert forced.text.startswith("yes")
    assert forced.token_ids == [*by_bytes.encode("yes"), *generate(network, by_bytes, "xyes", _greedy(17))[0].token_ids]


@pytest.mark.parametrize(
    "pattern",
    [
        r"\d{4}-\d\d-\d\d",
        "(yes|no|maybe)",
        "[^a-z]{3,9}",
        ".{0,20}",
        "(a|b)*c",
        "naïve|日本語?",
        "[\U0001f300-\U0001f5ff]{2}",
        r"^x+?y$",
        r"(?a)\w+!",
    ],
)
def test_what_is_written_under_an_expression_always_matches_it(pattern: str, by_bytes: Tokenizer) -> None:
    network, constraint = _network(by_bytes), Constraint(pattern, by_bytes)
    options = SamplingOptions(max_new_tokens=14, temperature=1.5, top_k=None)
    written = generate(network, by_bytes, "hello", options, count=20, constraint=constraint)
    assert all(re.fullmatch(pattern, sample.text) for sample in written), written
    assert all(len(sample.token_ids) <= 14 for sample in written)


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


@pytest.fixture
def dictate(by_bytes: Tokenizer) -> Any:
    """(samples, streamed pieces of each) of dictated texts, each followed by the end of text."""
    decoder = Decoder(_network(by_bytes))
    table = {text: id for id, text in enumerate(by_bytes.token_bytes) if len(text) == 1}

    def written(*texts: bytes | str, tokens: int = 200, stop: tuple[str, ...] = ()) -> tuple[list[Sample], list[list[str]]]:
        pieces: list[list[str]] = [[] for _ in texts]
        requests = []
        for text, heard in zip(texts, pieces, strict=True):
            encoded = text.encode() if isinstance(text, str) else text
            ids = (*(table[bytes([byte])] for byte in encoded), by_bytes.end_of_text)
            options = SamplingOptions(max_new_tokens=tokens, stop=stop, forced=ids[:tokens])
            requests.append(Request("p", options, on_text=heard.append))
        return list(write(decoder, by_bytes, requests)), pieces

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
