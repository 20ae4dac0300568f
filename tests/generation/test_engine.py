"""Test that generation matches full forward passes and is reproducible, and that stop strings and streaming work."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from tiny import PRESETS, model

from tinylm.generation.constraint import Constraint
from tinylm.generation.engine import Request, Sample, generate, generate_batch, sample_seed
from tinylm.generation.sampling import SamplingOptions
from tinylm.generation.search import beam_search
from tinylm.model.decoder import Decoder
from tinylm.model.transformer import Transformer
from tinylm.recipe.schema import ByteTokenizer, WordTokenizer
from tinylm.run import Run
from tinylm.text.sources import Piece
from tinylm.tokenizer import Tokenizer, training


@pytest.fixture(scope="module")
def byte_tokenizer() -> Tokenizer:
    return training.train(ByteTokenizer(kind="byte"), iter([Piece("text", True)]), print)


def _network(tokenizer: Tokenizer, preset: str = "modern", **parts: Any) -> Transformer:
    return model(preset, vocab_size=tokenizer.vocab_size, **parts)


def _greedy(tokens: int, **options: Any) -> SamplingOptions:
    return SamplingOptions(max_new_tokens=tokens, temperature=0.0, **options)


def _generate_without_cache(network: Transformer, tokenizer: Tokenizer, prompt: str, tokens: int) -> list[int]:
    """Decode greedily with a full forward pass per token. Keep the newer half of the context when it is full."""
    context_length = network.model.context_length
    window = (tokenizer.encode(prompt) or [tokenizer.end_of_text])[-context_length:]
    generated: list[int] = []
    while len(generated) < tokens:
        with torch.no_grad():
            token = int(network(torch.tensor([window]))[0, -1].argmax())
        if token == tokenizer.end_of_text:
            break
        generated.append(token)
        window = [*window, token]
        if len(window) > context_length:
            window = window[-max(1, context_length // 2) :]
    return generated


def test_the_space_after_the_prompt_is_kept_by_tokenizers_of_whole_words() -> None:
    words = training.train(WordTokenizer(kind="word", split="whitespace"), iter([Piece("the cat sat", True)]), print)
    network = _network(words)
    sampled = generate(network, words, "the cat", SamplingOptions(max_new_tokens=2, forced=words.encode("sat the")))
    assert sampled[0].text == " sat the"
    for prompt in ("", "the cat "):
        [sample] = generate(network, words, prompt, SamplingOptions(max_new_tokens=1, forced=words.encode("sat")))
        assert sample.text == "sat"
    [found] = beam_search(Decoder(network), words, "the", beams=1, max_new_tokens=2)
    assert found.sample.text == words.decode(words.encode("the") + found.sample.token_ids).removeprefix("the")


@pytest.mark.parametrize("prompt", ["", "a", "the cat", "exactly sixteen!", "a prompt that is longer than the context"])
@pytest.mark.parametrize("preset", PRESETS)
def test_greedy_text_equals_full_forward_passes(preset: str, prompt: str, byte_tokenizer: Tokenizer) -> None:
    network = _network(byte_tokenizer, preset)
    [sample] = generate(network, byte_tokenizer, prompt, _greedy(45))
    assert sample.token_ids == _generate_without_cache(network, byte_tokenizer, prompt, 45)
    assert len(set(sample.token_ids)) > 1


@pytest.mark.parametrize("preset", PRESETS)
def test_greedy_text_from_compiled_decoding_equals_full_forward_passes(preset: str, byte_tokenizer: Tokenizer) -> None:
    network = _network(byte_tokenizer, preset, ngram_embeddings=[2, 4], ngram_rows=97)
    for prompt in ("the cat", "exactly sixteen!"):
        [sample] = generate(Decoder(network, compiled=True), byte_tokenizer, prompt, _greedy(45))
        assert sample.token_ids == _generate_without_cache(network, byte_tokenizer, prompt, 45)


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
def test_greedy_text_with_every_model_part_equals_full_forward_passes(parts: dict[str, Any], byte_tokenizer: Tokenizer) -> None:
    network = _network(byte_tokenizer, **parts)
    for prompt in ("the cat", "exactly sixteen!"):
        [sample] = generate(network, byte_tokenizer, prompt, _greedy(45))
        assert sample.token_ids == _generate_without_cache(network, byte_tokenizer, prompt, 45)
        assert len(set(sample.token_ids)) > 1


def test_samples_with_the_same_prompt_keep_separate_n_grams(byte_tokenizer: Tokenizer) -> None:
    network, options = _network(byte_tokenizer, ngram_embeddings=[2, 3], ngram_rows=97), SamplingOptions(max_new_tokens=40)
    batched = generate(network, byte_tokenizer, "seed", options, seed=3, count=3)
    last = [generate(network, byte_tokenizer, "seed", options, seed=3, count=count)[-1] for count in (1, 2, 3)]
    assert [sample.token_ids for sample in batched] == [sample.token_ids for sample in last]


@pytest.mark.parametrize("parts", [{"n_kv_head": 1}, {"context_length": 1}, {"context_length": 2}, {"context_length": 15}], ids=str)
def test_greedy_text_with_unusual_shapes_equals_full_forward_passes(parts: dict[str, Any], byte_tokenizer: Tokenizer) -> None:
    network = _network(byte_tokenizer, "llama", **parts)
    [sample] = generate(network, byte_tokenizer, "hello", _greedy(40))
    assert sample.token_ids == _generate_without_cache(network, byte_tokenizer, "hello", 40)


def test_no_token_is_processed_more_than_about_twice(byte_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(_network(byte_tokenizer, "gpt2"))
    processed, step, hidden = [], decoder.step, decoder.network.hidden
    monkeypatch.setattr(
        decoder.network, "hidden", lambda tokens, cache, n_last: processed.append(tokens.shape[1]) or hidden(tokens, cache)[:, -1:]
    )
    monkeypatch.setattr(decoder, "step", lambda cache, tokens: processed.append(1) or step(cache, tokens))
    generate(decoder, byte_tokenizer, "prompt", _greedy(100))
    assert 105 <= sum(processed) <= 2 * 106


def test_a_seed_produces_the_same_text_in_any_batch_and_when_streamed(byte_tokenizer: Tokenizer) -> None:
    network, options = _network(byte_tokenizer), SamplingOptions(max_new_tokens=40, temperature=1.0)
    single = generate(network, byte_tokenizer, "seed", options, seed=3)[0]
    batched = generate(network, byte_tokenizer, "seed", options, seed=3, count=4)
    streamed = generate(network, byte_tokenizer, "seed", options, seed=3, on_text=lambda index, text: None)[0]
    assert batched[0].token_ids == single.token_ids == streamed.token_ids
    assert len({tuple(sample.token_ids) for sample in batched}) == 4
    assert generate(network, byte_tokenizer, "seed", options, seed=4)[0].token_ids != single.token_ids


def test_the_global_random_state_is_neither_used_nor_changed(byte_tokenizer: Tokenizer) -> None:
    network, options = _network(byte_tokenizer), SamplingOptions(max_new_tokens=20)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = generate(network, byte_tokenizer, "x", options)[0].token_ids
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert generate(network, byte_tokenizer, "x", options)[0].token_ids == first


PROMPTS = ["", "a", "the cat", "exactly sixteen!", "a prompt that is longer than the context", "b"]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("compiled", [False, True])
def test_prompts_of_different_lengths_generate_the_same_text_in_a_batch_and_alone(
    preset: str, rows: int, compiled: bool, byte_tokenizer: Tokenizer
) -> None:
    decoder = Decoder(_network(byte_tokenizer, preset), compiled=compiled)
    options = SamplingOptions(max_new_tokens=40, temperature=1.0)
    requests = [Request(prompt, options, seed) for seed, prompt in enumerate(PROMPTS)]
    batched = list(generate_batch(decoder, byte_tokenizer, requests, rows=rows))
    single = [next(generate_batch(decoder, byte_tokenizer, [request])) for request in requests]
    assert [sample.prompt for sample in batched] == PROMPTS
    assert [sample.token_ids for sample in batched] == [sample.token_ids for sample in single]


@pytest.mark.parametrize("compiled", [False, True])
def test_requests_with_different_options_do_not_affect_each_other(compiled: bool, byte_tokenizer: Tokenizer) -> None:
    decoder = Decoder(_network(byte_tokenizer), compiled=compiled)
    option_sets = [
        SamplingOptions(max_new_tokens=30, temperature=1.0),
        _greedy(7),
        SamplingOptions(max_new_tokens=25, temperature=1.0, repetition_penalty=2.0, frequency_penalty=0.3),
        SamplingOptions(max_new_tokens=20, temperature=2.0, top_k=None, top_p=0.9, presence_penalty=1.0),
        SamplingOptions(max_new_tokens=20, temperature=1.0, logit_bias=((5, float("-inf")), (9, 2.0)), logprobs=2),
    ]
    requests = [Request("hello", options, seed) for seed, options in enumerate(option_sets * 2)]
    batched = [sample.token_ids for sample in generate_batch(decoder, byte_tokenizer, requests, rows=4)]
    assert batched == [next(generate_batch(decoder, byte_tokenizer, [request])).token_ids for request in requests]


def test_sampled_first_tokens_follow_the_softmax(byte_tokenizer: Tokenizer) -> None:
    """Apply Pearson's chi-square test to the whole engine. Tokens with an expected count below five share one cell."""
    network, count = _network(byte_tokenizer), 4000
    options = SamplingOptions(max_new_tokens=1, temperature=0.7, top_k=None)
    requests = [Request("the", options, sample_seed(5, index)) for index in range(count)]
    sampled = [sample.token_ids[0] for sample in generate_batch(network, byte_tokenizer, requests, rows=500) if sample.token_ids]
    with torch.no_grad():
        logits = network(torch.tensor([byte_tokenizer.encode("the")]))[0, -1].double() / 0.7
    expected = count * logits.softmax(-1)
    seen = torch.bincount(torch.tensor(sampled), minlength=len(expected)).double()
    seen[byte_tokenizer.end_of_text] = count - len(sampled)
    common = expected >= 5
    cells = [(seen[common], expected[common]), (seen[~common].sum()[None], expected[~common].sum()[None])]
    square = sum(float(((a - b) ** 2 / b).sum()) for a, b in cells)
    degrees = int(common.sum())
    assert degrees > 20
    assert square < degrees + 4 * (2 * degrees) ** 0.5


def test_recorded_log_probabilities_match_the_model(byte_tokenizer: Tokenizer) -> None:
    network = _network(byte_tokenizer)
    options = SamplingOptions(max_new_tokens=8, temperature=2.0, top_k=40, logprobs=3, repetition_penalty=1.5)
    streamed: list[int] = []
    request = Request("ab", options, seed=1, on_token=lambda choice: streamed.append(choice.id))
    [sample] = generate_batch(network, byte_tokenizer, [request])
    ids = byte_tokenizer.encode("ab")
    assert streamed == sample.token_ids == [choice.id for choice in sample.choices]
    for choice in sample.choices:
        with torch.no_grad():
            logprobs = network(torch.tensor([ids]))[0, -1].log_softmax(-1)
        assert choice.logprob == pytest.approx(float(logprobs[choice.id]), abs=1e-4)
        assert [id for id, _ in choice.alternatives] == logprobs.topk(3).indices.tolist()
        ids.append(choice.id)


def test_bans_biases_and_forced_tokens_take_effect(byte_tokenizer: Tokenizer) -> None:
    network = _network(byte_tokenizer)
    unbiased = generate(network, byte_tokenizer, "x", _greedy(20))[0].token_ids
    banned = generate(network, byte_tokenizer, "x", _greedy(20, logit_bias=tuple((id, float("-inf")) for id in set(unbiased))))[0]
    assert not set(unbiased) & set(banned.token_ids)
    assert generate(network, byte_tokenizer, "x", _greedy(5, logit_bias=((17, 1e4),)))[0].token_ids == [17] * 5
    forced = generate(network, byte_tokenizer, "x", _greedy(20, forced=tuple(byte_tokenizer.encode("yes"))))[0]
    assert forced.text.startswith("yes")
    assert forced.token_ids == [*byte_tokenizer.encode("yes"), *generate(network, byte_tokenizer, "xyes", _greedy(17))[0].token_ids]


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
def test_generated_text_always_matches_its_regular_expression(pattern: str, byte_tokenizer: Tokenizer) -> None:
    network, constraint = _network(byte_tokenizer), Constraint(pattern, byte_tokenizer)
    options = SamplingOptions(max_new_tokens=14, temperature=1.5, top_k=None)
    samples = generate(network, byte_tokenizer, "hello", options, count=20, constraint=constraint)
    assert all(re.fullmatch(pattern, sample.text) for sample in samples), samples
    assert all(len(sample.token_ids) <= 14 for sample in samples)


def test_a_strong_repetition_penalty_prevents_all_repetition(byte_tokenizer: Tokenizer) -> None:
    network = _network(byte_tokenizer)
    [sample] = generate(network, byte_tokenizer, "the prompt", _greedy(40, repetition_penalty=1e9))
    ids = [*sample.token_ids, *set(byte_tokenizer.encode("the prompt"))]
    assert len(ids) == len(set(ids))


def test_the_sample_is_empty_if_max_new_tokens_is_zero(byte_tokenizer: Tokenizer) -> None:
    [sample] = generate(_network(byte_tokenizer), byte_tokenizer, "x", _greedy(0))
    assert (sample.text, sample.token_ids, sample.finish_reason) == ("", [], "length")


def test_a_trained_model_continues_an_empty_prompt(tiny_run: Run) -> None:
    network = tiny_run.network(tiny_run.checkpoint(), torch.device("cpu"))
    [sample] = generate(network, tiny_run.tokenizer, "", SamplingOptions(max_new_tokens=50))
    assert sample.text == tiny_run.tokenizer.decode(sample.token_ids)
    assert sample.finish_reason in ("length", "end")
    assert sample.tokens_per_second > 0


# The tests below force the generated tokens, so the resulting text is known in advance.


@pytest.fixture
def generate_forced(byte_tokenizer: Tokenizer) -> Any:
    """Return a function that generates the specified texts and returns the samples and the streamed pieces."""
    decoder = Decoder(_network(byte_tokenizer))
    byte_ids = {text: id for id, text in enumerate(byte_tokenizer.token_bytes) if len(text) == 1}

    def forced(*texts: bytes | str, tokens: int = 200, stop: tuple[str, ...] = ()) -> tuple[list[Sample], list[list[str]]]:
        pieces: list[list[str]] = [[] for _ in texts]
        requests = []
        for text, received in zip(texts, pieces, strict=True):
            encoded = text.encode() if isinstance(text, str) else text
            ids = (*(byte_ids[bytes([byte])] for byte in encoded), byte_tokenizer.end_of_text)
            options = SamplingOptions(max_new_tokens=tokens, stop=stop, forced=ids[:tokens])
            requests.append(Request("p", options, on_text=received.append))
        return list(generate_batch(decoder, byte_tokenizer, requests)), pieces

    return forced


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
def test_a_stop_string_ends_the_sample_and_is_not_part_of_it(
    text: str, stop: tuple[str, ...], expected: str, reason: str, generate_forced: Any
) -> None:
    """Every token is one byte, so each stop string spans several tokens."""
    [sample], [pieces] = generate_forced(text, stop=stop)
    assert (sample.text, sample.finish_reason) == (expected, reason)
    assert "".join(pieces) == expected


def test_text_is_streamed_as_soon_as_it_cannot_become_a_stop_string(generate_forced: Any) -> None:
    _, [pieces] = generate_forced("abSTx", stop=("STOP",))
    assert pieces == ["a", "b", "STx"]


@pytest.mark.parametrize("text", ["naïve café", "日本語のテキスト", "🦊 and 🐍", "e\u0301 is two"])
def test_streamed_characters_are_complete(text: str, generate_forced: Any) -> None:
    [sample], [pieces] = generate_forced(text)
    assert pieces == list(text)
    assert sample.text == text


def test_invalid_utf8_becomes_replacement_characters(generate_forced: Any) -> None:
    [sample], [pieces] = generate_forced(b"a\xffb\xe6\x97")
    assert sample.text == "a\ufffdb\ufffd"
    assert "".join(pieces) == sample.text


def test_a_character_that_max_new_tokens_cuts_off_becomes_a_replacement_character(generate_forced: Any) -> None:
    [sample], [pieces] = generate_forced("a日", tokens=2)
    assert (sample.text, sample.finish_reason) == ("a\ufffd", "length")
    assert "".join(pieces) == sample.text


def test_samples_in_a_batch_end_independently(generate_forced: Any) -> None:
    samples, pieces = generate_forced("short", "a longer text", "stops HERE and not there", stop=("HERE",))
    assert [sample.text for sample in samples] == ["short", "a longer text", "stops "]
    assert [sample.finish_reason for sample in samples] == ["end", "end", "stop"]
    assert ["".join(streamed) for streamed in pieces] == [sample.text for sample in samples]


def test_the_end_of_text_token_is_not_part_of_the_sample(generate_forced: Any, byte_tokenizer: Tokenizer) -> None:
    [sample], _ = generate_forced("done")
    assert byte_tokenizer.end_of_text not in sample.token_ids
    assert byte_tokenizer.decode(sample.token_ids) == sample.text == "done"
