"""Test that a mixture has the requested shares at every position, and that its order depends only on the seed and the position."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tinylm.cost.plan import make_plan
from tinylm.data import estimate, formats
from tinylm.data.estimate import estimate_text_size
from tinylm.data.masking import MaskedWindows
from tinylm.data.mixture import Mixture, Order
from tinylm.data.prepare import PreparedText, open_prepared
from tinylm.data.source_spans import FILE
from tinylm.errors import InputError
from tinylm.pipeline import train
from tinylm.recipe import Recipe, RecipeError, loads
from tinylm.recipe.mixture import MixedSource, MixtureShares
from tinylm.recipe.schema import require_text
from tinylm.reporting import SILENT, CollectingReporter
from tinylm.run import Run
from tinylm.training.feed import Feed
from tinylm.training.metrics import EvaluationEvent
from tinylm.training.objectives import CausalLM

Weights = Sequence[float | tuple[float, float]]
TOTAL = 600


def shares_of(weights: Weights) -> MixtureShares:
    return MixtureShares.of([MixedSource(source=(f"{number}.txt",), weight=weight) for number, weight in enumerate(weights)])


def exact_counts(weights: Weights, position: int) -> list[Fraction]:
    """Return the integral of each share over the first `position` examples."""
    first, last = (
        [Fraction(repr(weight[moment] if isinstance(weight, tuple) else weight)) for weight in weights] for moment in (0, 1)
    )
    counts = []
    for before, after in zip(first, last, strict=True):
        start, end = before / sum(first), after / sum(last)
        inside = min(position, TOTAL)
        ramp = start * inside + (end - start) * Fraction(inside * inside, 2 * TOTAL)
        counts.append(ramp + end * (position - inside))
    return counts


MIXTURES: list[Weights] = [
    [1.0],
    [2.0, 1.0],
    [1.0, 1.0, 1.0],
    [0.1, 5.0, 0.37, 2.0],
    [0.001, 1.0],
    [(2.0, 0.5), 1.0],
    [(0.0, 1.0), (1.0, 0.0), 0.3],
]


@pytest.mark.parametrize("weights", MIXTURES)
def test_at_every_position_each_source_has_supplied_its_share(weights: Weights) -> None:
    order = Order(shares_of(weights), TOTAL)
    chosen = order.datasets(0, TOTAL + 50)
    counts = np.zeros(len(weights), dtype=int)
    for position, source in enumerate(chosen):
        assert order.counts(position) == counts.tolist()
        for count, exact in zip(counts, exact_counts(weights, position), strict=True):
            assert abs(count - exact) <= Fraction(len(weights) + 3, 2)
        counts[source] += 1


@pytest.mark.parametrize("weights", MIXTURES)
def test_the_order_does_not_depend_on_how_it_is_divided_into_batches(weights: Weights) -> None:
    order = Order(shares_of(weights), TOTAL)
    together = order.datasets(0, 100)
    for size in (1, 7, 64):
        parts = [order.datasets(start, min(size, 100 - start)) for start in range(0, 100, size)]
        assert np.array_equal(np.concatenate(parts), together)


def test_a_source_whose_weight_ends_at_0_is_read_less_and_less() -> None:
    chosen = Order(shares_of([(1.0, 0.0), 1.0]), TOTAL).datasets(0, TOTAL)
    first, middle, last = (int((chosen[start : start + 100] == 0).sum()) for start in (0, 250, 500))
    # The share falls from 1/2 to 0. Over each part, it is about the share in the middle of the part.
    assert (first, middle, last) == pytest.approx((100 * 11 / 24, 25, 100 / 24), abs=2)


# Text


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYLM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def sources(tmp_path: Path) -> tuple[Path, Path]:
    """Two texts without common characters, so that every token reveals its source."""
    words, numbers = tmp_path / "words.txt", tmp_path / "numbers.jsonl"
    words.write_text("".join(f"{chr(97 + i % 26)}{chr(97 + i // 26 % 26)} {chr(97 + i % 7)}\n" for i in range(500)))
    numbers.write_text("".join(f'{{"text": "{i:03d},{i * 7 % 100}"}}\n' for i in range(100)))
    return words, numbers


def mixed_recipe(sources: tuple[Path, Path], *overrides: str, weights: tuple[str, str] = ("3", "1")) -> Recipe:
    words, numbers = sources
    return loads(
        f"data:\n  train:\n  - {{source: {words}, weight: {weights[0]}}}\n  - {{source: {numbers}, weight: {weights[1]}}}\n"
        "tokenizer: byte\n"
        "model: {n_layer: 1, n_head: 2, n_embd: 16, context_length: 16}\n"
        "training: {steps: 8, global_batch_size: 8, micro_batch_size: 4, precision: fp32, compile: off, log_every: 1}\n"
        "evaluation: {every: 4}\ncheckpoint: {every: 2, keep: 10}\n",
        overrides,
    )


def prepare(recipe: Recipe, reporter: Any = SILENT) -> PreparedText:
    prepared = formats.find(recipe.data).prepare(recipe, reporter, 1)
    assert isinstance(prepared, PreparedText)
    return prepared


def is_number(tokens: np.ndarray, prepared: PreparedText) -> np.ndarray:
    """Return whether each row comes from the numbers. Rows may also contain control tokens."""
    table = prepared.tokenizer.token_bytes
    digits = np.isin(tokens, [id for id, text in enumerate(table) if text and text in b"0123456789,"])
    others = np.isin(tokens, [id for id, text in enumerate(table) if text and text not in b"0123456789,"])
    assert not (digits.any(axis=1) & others.any(axis=1)).any(), "a row mixes both sources"
    return np.asarray(digits.any(axis=1))


@pytest.mark.parametrize("shuffle", ["windows", "documents"])
def test_sequences_come_from_one_source_each_and_follow_the_weights(sources: tuple[Path, Path], shuffle: str) -> None:
    recipe = mixed_recipe(sources, f"data.shuffle={shuffle}")
    prepared = prepare(recipe)
    dataset = formats.find(recipe.data).dataset(recipe, prepared)
    rows = is_number(dataset.examples(0, 400)["tokens"], prepared)
    assert rows.sum() == 100
    assert all(rows[start : start + 40].sum() == 10 for start in range(0, 400, 40))
    assert np.array_equal(dataset.examples(123, 9)["tokens"], dataset.examples(100, 50)["tokens"][23:32])


def test_each_source_keeps_the_order_that_it_has_alone(sources: tuple[Path, Path]) -> None:
    mixture = mixed_recipe(sources)
    alone = mixed_recipe(sources, f"data.train={sources[1]}")
    prepared = prepare(mixture)
    rows = formats.find(mixture.data).dataset(mixture, prepared).examples(0, 80)["tokens"]
    expected = formats.find(alone.data).dataset(alone, prepare(alone)).examples(0, 20)["tokens"]
    assert np.array_equal(rows[is_number(rows, prepared)], expected)


def test_a_plain_list_of_sources_is_concatenated_as_before(sources: tuple[Path, Path]) -> None:
    plain = mixed_recipe(sources, f"data.train=[{sources[0]}, {sources[1]}]")
    assert require_text(plain.data).mixture == ()
    prepared = prepare(plain)
    assert prepared.spans == {}
    assert not isinstance(formats.find(plain.data).dataset(plain, prepared), Mixture)


@pytest.mark.parametrize("by", ["tail", "document"])
def test_every_source_is_split_and_its_tokens_are_recorded(sources: tuple[Path, Path], by: str) -> None:
    reporter = CollectingReporter()
    if by == "document":
        sources[0].write_text("".join(f'{{"text": "line {chr(97 + i % 26)}{chr(97 + i // 26)}"}}\n' for i in range(200)))
        sources = (sources[0].rename(sources[0].with_suffix(".jsonl")), sources[1])
    recipe = mixed_recipe(sources, f"data.heldout={{share: 0.2, by: {by}}}", "data.test=0.1")
    prepared = prepare(recipe, reporter)
    assert set(prepared.spans) == {"train", "heldout", "test"}
    for part, shard in (("train", prepared.train), ("heldout", prepared.heldout), ("test", prepared.test)):
        assert shard is not None
        words, numbers = (span.of(shard) for span in prepared.spans[part])
        texts = [b"".join(prepared.tokenizer.token_bytes[id] for id in text.tokens) for text in (words, numbers)]
        assert not any(b"0" <= bytes([byte]) <= b"9" for byte in texts[0])
        assert all(bytes([byte]) in b"0123456789," for byte in texts[1])
        assert [len(text) for text in texts] == [words.counts.bytes, numbers.counts.bytes]
        for text in (words, numbers):
            assert text.problem() is None
            assert len(text.documents()) == text.counts.documents
    opened = open_prepared(prepared.folder, prepared.fingerprint, prepared.tokenizer.backend.to_str())
    assert opened.spans == prepared.spans


def test_a_damaged_record_of_the_sources_is_rejected(sources: tuple[Path, Path]) -> None:
    prepared = prepare(mixed_recipe(sources))
    file = prepared.folder / FILE
    for damaged in ("", "[]", '{"train": [[1, 2]]}', file.read_text().replace("0, ", "1, ", 1)):
        file.write_text(damaged)
        with pytest.raises(InputError, match="the record of the sources is damaged"):
            open_prepared(prepared.folder, prepared.fingerprint, prepared.tokenizer.backend.to_str())


def test_masked_models_can_be_trained_on_a_mixture(sources: tuple[Path, Path], tmp_path: Path) -> None:
    model = "model={architecture: encoder, n_layer: 1, n_head: 2, n_embd: 16, context_length: 18}"
    recipe = mixed_recipe(sources, model, weights=("[1, 3]", "1"))
    prepared = prepare(recipe)
    dataset = formats.find(recipe.data).dataset(recipe, prepared)
    assert isinstance(dataset, MaskedWindows)
    assert isinstance(dataset.stream, Mixture)
    examples = dataset.examples(0, 64)
    numbers = is_number(np.where(examples["targets"] >= 0, examples["targets"], examples["tokens"]), prepared)
    assert numbers.sum() == 24  # the mean of 1/2 and 1/4
    assert numbers[:32].sum() > numbers[32:].sum()
    train(mixed_recipe(sources, model, "training.steps=1"), tmp_path / "run", device="cpu")
    evaluation = [line for line in Run(tmp_path / "run").metrics() if line["kind"] == "eval"][-1]
    assert set(evaluation["by_source"]) == {str(path) for path in sources}


def test_a_source_that_is_shorter_than_one_sequence_is_named(sources: tuple[Path, Path]) -> None:
    recipe = mixed_recipe(sources, "data.heldout=0.5")
    prepared = prepare(recipe)
    longer = mixed_recipe(sources, "data.heldout=0.5", "model.context_length=400")
    with pytest.raises(InputError, match=r"numbers\.jsonl: the training text has .* fewer than context_length 400"):
        formats.find(longer.data).dataset(longer, prepared)


# Training


def weights_of(folder: Path) -> bytes:
    return (Run(folder).checkpoint("last").path / "model.safetensors").read_bytes()


def test_a_resumed_run_on_a_mixture_is_bit_identical(sources: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = mixed_recipe(sources, "training.steps=4", weights=("[3, 0]", "[1, 2]"))
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(recipe, whole, device="cpu")
    assert train(recipe, resumed, device="cpu", stop_after=0.0).step < 4
    train(recipe, resumed, device="cpu", resume=True)
    assert weights_of(resumed) == weights_of(whole)


def test_batches_do_not_depend_on_the_number_of_processes(sources: tuple[Path, Path]) -> None:
    recipe = mixed_recipe(sources, weights=("[3, 0]", "[1, 2]"))
    prepared = prepare(recipe)
    opened = open_prepared(prepared.folder, prepared.fingerprint, prepared.tokenizer.backend.to_str())
    dataset, of_other_process = (formats.find(recipe.data).dataset(recipe, data) for data in (prepared, opened))
    with Feed(dataset, CausalLM(), seed=1) as feed:
        whole = [feed.batch(start, 8).share.inputs for start in range(0, 64, 8)]
    shares = []
    for rank in range(2):
        with Feed(of_other_process, CausalLM(), seed=1, rank=rank, world_size=2) as feed:
            shares.append([feed.batch(start, 8).share.inputs for start in range(0, 64, 8)])
    for inputs, *of_ranks in zip(whole, *shares, strict=True):
        assert torch.equal(inputs, torch.cat(of_ranks))


def test_changed_weights_are_rejected_on_resume(sources: tuple[Path, Path], tmp_path: Path) -> None:
    train(mixed_recipe(sources), tmp_path / "run", device="cpu", stop_after=0.0)
    with pytest.raises(InputError, match=r"data\.train"):
        train(mixed_recipe(sources, weights=("1", "1")), tmp_path / "run", device="cpu", resume=True)


def test_the_held_out_loss_is_logged_for_each_source_and_the_total_is_weighted_by_tokens(
    sources: tuple[Path, Path], tmp_path: Path
) -> None:
    from tinylm.evaluation.evaluate_run import evaluate_run

    reporter = CollectingReporter()
    recipe = mixed_recipe(sources)
    train(recipe, tmp_path / "run", device="cpu", reporter=reporter)
    run = Run(tmp_path / "run")
    line = [line for line in run.metrics() if line["kind"] == "eval"][-1]
    evaluation = evaluate_run(run, checkpoint="last", device="cpu")
    rows = {row.name: row for row in evaluation.tables["source"]}
    assert set(rows) == set(line["by_source"]) == {str(path) for path in sources}
    for name, row in rows.items():
        assert line["by_source"][name]["val_loss"] == pytest.approx(row.loss, rel=1e-5)
        assert line["by_source"][name]["val_bits_per_byte"] == pytest.approx(row.bits_per_byte, rel=1e-5)
    event = {key: value for key, value in line.items() if key != "kind"}
    assert EvaluationEvent.from_line(event).as_line() == event
    total = sum(row.loss * row.tokens for row in rows.values()) / sum(row.tokens for row in rows.values())
    assert line["val_loss"] == pytest.approx(total, rel=1e-5)
    assert line["val_loss"] == pytest.approx(evaluation.perplexity.loss, rel=1e-5)
    assert line["val_bits_per_byte"] == pytest.approx(evaluation.perplexity.bits_per_byte, rel=1e-5)
    used = [note for note in reporter.notes if note.startswith("mixture: ")]
    assert used[0].startswith(f"mixture: 75.0% of the sequences from {sources[0]}, of which ")
    assert used[1].startswith(f"mixture: 25.0% of the sequences from {sources[1]}, of which ")


def test_a_limited_evaluation_uses_the_beginning_of_every_source(sources: tuple[Path, Path], tmp_path: Path) -> None:
    train(mixed_recipe(sources, "evaluation.max_tokens=50"), tmp_path / "run", device="cpu")
    line = [line for line in Run(tmp_path / "run").metrics() if line["kind"] == "eval"][-1]
    assert set(line["by_source"]) == {str(path) for path in sources}


def test_the_plan_and_the_start_of_training_tell_how_often_each_source_is_read(
    sources: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = mixed_recipe(sources, "training.steps=40", weights=("1", "[0, 1]"))
    prepared = prepare(recipe)
    dataset = formats.find(recipe.data).dataset(recipe, prepared)
    assert isinstance(dataset, Mixture)
    windows = [(len(span.of(prepared.train)) - 1) // 16 for span in prepared.spans["train"]]
    assert dataset.epochs(320) == pytest.approx([240 / windows[0], 80 / windows[1]])
    size = estimate_text_size(recipe.data, recipe.tokenizer, SILENT)
    plan = make_plan(recipe, size.vocab_size, size.train_tokens, source_tokens=size.source_tokens)
    assert [use.share for use in plan.sources] == [0.75, 0.25]
    assert [use.epochs for use in plan.sources] == pytest.approx(dataset.epochs(320), rel=0.3)  # epochs of tokens, not of windows
    monkeypatch.setattr(estimate, "EXACT_LIMIT_BYTES", 100)
    sampled = estimate_text_size(recipe.data, recipe.tokenizer, SILENT)
    assert not sampled.exact
    assert sampled.source_tokens == size.source_tokens, "one token is one byte"


# Mistakes


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ("[{source: A, weight: 0}, B]", "data.train[0].weight: must be a number above 0"),
        ("[A, {source: B, weight: -1}]", "data.train[1].weight: must be a number above 0"),
        ("[A, {source: B, weight: .nan}]", "data.train[1].weight: must be a number above 0"),
        ("[A, {source: B, weight: [1, 2, 3]}]", "data.train[1].weight: must be a number above 0"),
        ("[A, {source: B, weight: [0, 0]}]", "data.train[1].weight: must be a number above 0"),
        ("[A, {source: B, wieght: 2}]", "data.train[1].wieght: unknown key (did you mean weight?)"),
        ("[A, {weight: 2}]", "data.train[1].source: missing"),
        ("[{source: A, weight: 2}, 7]", "data.train[1]: must be a section with keys such as source, weight"),
        ("[{source: A}, {source: A}]", "data.train[1].source: A is also in data.train[0] (list every source once)"),
        ("[{source: A}, {source: [B, ./A]}]", "data.train[1].source: ./A is also in data.train[0] (list every source once)"),
        ("[{source: A}, {source: missing.txt}]", "data.train[1].source: missing.txt: no such file or folder"),
        ("[{source: A}, {source: EMPTY}]", "data.train[1].source: EMPTY is empty (use more text or remove the source)"),
        (
            "[{source: A, weight: [0, 1]}, {source: B, weight: [0, 1]}]",
            "data.train: all weights are 0 at the beginning of training",
        ),
    ],
)
def test_mistakes_in_a_mixture_are_reported_with_their_place(
    mixture: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in (("A", "text " * 900), ("B", "more text " * 900), ("EMPTY", "")):
        Path(name).write_text(text)
    with pytest.raises(RecipeError) as caught:
        loads(f"data: {{train: {mixture}}}\ntraining: {{steps: 1}}\n", name="my.yaml")
    (problem,) = caught.value.problems
    assert problem.startswith(f"my.yaml:1: {message}")


def test_changing_weights_require_a_fixed_length_and_a_model_that_reads_windows(sources: tuple[Path, Path]) -> None:
    with pytest.raises(RecipeError, match=r"data\.train\[0\]\.weight: two weights require training.steps, tokens or epochs"):
        mixed_recipe(sources, "training={minutes: 1}", weights=("[2, 1]", "1"))
    with pytest.raises(RecipeError, match=r"data\.train: the ngram architecture counts the whole text once"):
        mixed_recipe(sources, "model={architecture: ngram}")


def test_a_source_without_text_is_named(sources: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = mixed_recipe((sources[0], sources[1]))
    sources[1].write_text("\n\n" * 100)
    with pytest.raises(InputError, match=r"numbers\.jsonl: the text is empty"):
        prepare(recipe)
