"""Inspecting a text: losses, targets and positions, the tour, and models that lack attention or a linear head."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from inspected import HOSTILE
from untrained_runs import save_run

from tinylm.errors import InputError
from tinylm.evaluation.evaluate_run import evaluate_run
from tinylm.inspection.input import InspectOptions
from tinylm.inspection.learning import pattern_tokens, select_checkpoints, view_checkpoints
from tinylm.inspection.overview import inspect_text, token_text
from tinylm.inspection.page import PageOptions, collect
from tinylm.inspection.tour import MAX_WORDS, as_html, tour
from tinylm.model import registry
from tinylm.pipeline import train
from tinylm.recipe import loads
from tinylm.reporting import SILENT, CollectingReporter
from tinylm.run import Run
from tinylm.tokenizer.control_tokens import ControlTokens

TEXT = "The for statement is used"


def test_losses_after_an_end_of_text_token_match_an_evaluation(tiny_run: Run, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    inspected = inspect_text(tiny_run, TEXT, InspectOptions(start_of_document=True))
    losses = [token.loss for token in inspected.tokens]
    assert losses[0] is None
    expected = evaluate_run(tiny_run, [str(tmp_path / "text.txt")]).perplexity
    assert math.fsum(loss for loss in losses if loss is not None) == pytest.approx(expected.nats, rel=1e-5)
    assert len(losses) - 1 == expected.tokens


def test_the_last_prediction_is_attributed_unless_another_is_requested(tiny_run: Run) -> None:
    inspected = inspect_text(tiny_run, TEXT)
    ids, logits = [token.id for token in inspected.tokens], inspected.forward.logits[0]
    assert inspected.attributed is not None
    assert inspected.attributed.position == len(ids) - 1
    assert inspected.attributed.target_id == int(logits[-1].argmax()) == inspected.next_tokens[0][0]
    assert inspected.attributed.sum == pytest.approx(inspected.attributed.logit, abs=1e-3)
    assert inspected.attributed.logit == pytest.approx(float(logits[-1].max()), abs=1e-4)
    other = inspect_text(tiny_run, TEXT, InspectOptions(position=1, target="@65"))
    assert other.attributed is not None
    assert (other.attributed.position, other.attributed.target_id) == (1, 65)
    assert other.attributed.logit == pytest.approx(float(logits[1, 65]), abs=1e-4)


def test_a_long_text_is_truncated_with_a_warning(tiny_run: Run) -> None:
    reporter = CollectingReporter()
    inspected = inspect_text(tiny_run, TEXT * 9, InspectOptions(max_tokens=5), reporter=reporter)
    assert len(inspected.tokens) == 5
    assert reporter.warnings[0].startswith("only the first 5 of ")


@pytest.mark.parametrize(
    ("text", "options", "problem"),
    [
        ("", InspectOptions(), "--text: the text is empty"),
        (TEXT, InspectOptions(max_tokens=33), r"--max-tokens: must be 1 to 32 \(the model's context length\), not 33"),
        (TEXT, InspectOptions(max_tokens=0), "--max-tokens: must be 1 to 32"),
        (TEXT, InspectOptions(position=99), "--position: must be 0 to"),
        (TEXT, InspectOptions(target="no such token"), "--target: 'no such token' is not a single token"),
    ],
)
def test_invalid_options_are_rejected(text: str, options: InspectOptions, problem: str, tiny_run: Run) -> None:
    with pytest.raises(InputError, match=problem):
        inspect_text(tiny_run, text, options)


def test_every_token_has_readable_text(tiny_run: Run) -> None:
    tokenizer = tiny_run.tokenizer
    assert "".join(token_text(tokenizer, id) for id in tokenizer.encode("a b\n")) == "a b\n"
    assert token_text(tokenizer, tokenizer.end_of_text or 0) == "<|endoftext|>"
    assert token_text(tokenizer, 10**6) == "@1000000"
    assert "\\x" in "".join(token_text(tokenizer, id) for id in tokenizer.encode("😀"))


def test_checkpoints_are_selected_and_viewed(tiny_run: Run, tmp_path: Path) -> None:
    assert select_checkpoints(tiny_run, "all") == tiny_run.checkpoints()
    assert [checkpoint.step for checkpoint in select_checkpoints(tiny_run, "last 1")] == [20]
    for invalid in ("some", "last 0", "-1"):
        with pytest.raises(InputError, match="--checkpoints: must be all or last N"):
            select_checkpoints(tiny_run, invalid)
    [view] = view_checkpoints(tiny_run, tiny_run.tokenizer.encode(TEXT), select_checkpoints(tiny_run, "1"), pattern_tokens=3)
    inspected = inspect_text(tiny_run, TEXT, checkpoint="20")
    assert view.losses[1:] == pytest.approx([token.loss for token in inspected.tokens[1:]], abs=1e-5)
    assert view.losses[0] is None
    assert view.patterns is not None
    assert view.patterns.shape == (2, 2, 3, 3)
    assert pattern_tokens(tiny_run, 10, 1) == 10
    assert pattern_tokens(tiny_run, 10_000, 4) == 237


def test_inspecting_a_recurrent_model_reports_the_missing_parts(tiny_run: Run, tmp_path: Path) -> None:
    recipe = loads("data: {train: text.txt}\nmodel: {architecture: gru}\ntraining: {steps: 1}\n", check_files=False)
    network = registry.build(recipe.model, tiny_run.tokenizer.vocab_size, 0).eval()
    run = save_run(tmp_path / "gru", network, tiny_run.tokenizer)  # type: ignore[arg-type]
    inspected = inspect_text(run, TEXT)
    assert set(inspected.missing) == {"heads", "lens", "attribution"}
    assert all("gru" in reason for reason in inspected.missing.values())
    document = inspected.as_dict()
    assert (document["heads"], document["logit_lens"], document["attribution"]) == ([], [], None)
    assert document["loss"] > 0
    data = collect(inspected, [], PageOptions(), SILENT)
    assert data["attention"] is None
    assert data["embeddings"]["parts"][0]["values"]["shape"] == [len(inspected.tokens), network.input_embedding().weight.shape[1]]
    titles = [step.title for step in tour(inspected) if step.text.startswith("Not in this model")]
    assert "One attention head by hand" in titles


# The tour


def test_every_step_of_the_tour_is_short_and_has_numbers(tiny_run: Run) -> None:
    steps = tour(inspect_text(tiny_run, TEXT))
    assert len(steps) == 14
    assert all(len(step.text.split()) <= MAX_WORDS for step in steps)
    assert all(step.numbers for step in steps)


def test_the_gradient_step_predicts_the_change_in_the_loss_and_restores_the_weight(tiny_run: Run) -> None:
    inspected = inspect_text(tiny_run, TEXT)
    before = {name: weight.clone() for name, weight in inspected.forward.network.state_dict().items()}
    numbers = dict(tour(inspected)[-1].numbers)
    change, predicted = (float(part.split()[-1]) for part in numbers["loss"].split("change ")[1].split(", "))
    assert predicted < 0
    assert change == pytest.approx(predicted, rel=0.2, abs=3e-6)
    assert all(torch.equal(weight, before[name]) for name, weight in inspected.forward.network.state_dict().items())


def test_the_tour_escapes_hostile_text(tiny_run: Run) -> None:
    page = as_html(tour(inspect_text(tiny_run, HOSTILE)), "<i>{{STEPS}}</i>")
    assert "</script>" not in page
    assert "<i>" not in page
    assert "<h1>&lt;i&gt;{{STEPS}}&lt;/i&gt;</h1>" in page
    assert "\u202e" not in page
    assert "\x00" not in page


def test_the_tour_needs_a_token_to_predict(tiny_run: Run) -> None:
    with pytest.raises(InputError, match="--text: must have at least two tokens"):
        tour(inspect_text(tiny_run, "a"))


# Encoders


def _encoder_run(folder: Path, preset: str) -> Run:
    """Train an encoder for two steps, with a held-out split and a tokenizer that has control tokens."""
    text = folder / "text.txt"
    text.write_text("the cat sat on the mat and the dog ran to the cat\n" * 60)
    shape = "n_layer: 2, n_head: 2, n_embd: 16, context_length: 24"
    recipe = loads(
        f"data: {{train: {text}, heldout: {{share: 0.2, by: tail}}}}\n"
        "tokenizer: {kind: char}\n"
        f"model: {{architecture: encoder, preset: {preset}, {shape}}}\n"
        "training: {steps: 2, global_batch_size: 2, micro_batch_size: 2, precision: fp32, compile: off}\n"
        "evaluation: {every: 2}\n"
    )
    train(recipe, folder / "run", device="cpu")
    return Run.open(folder / "run")


def test_an_encoder_predicts_each_token_from_all_others(tmp_path: Path) -> None:
    run = _encoder_run(tmp_path, "modern")
    inspected = inspect_text(run, "the cat [MASK]at")
    control = ControlTokens.of(run.tokenizer)
    ids = [token.id for token in inspected.tokens]
    assert (ids[0], ids[-1]) == (control.cls, control.sep)
    mask = ids.index(control.mask)
    assert inspected.attributed is not None
    assert inspected.attributed.position == mask
    assert [index for index, token in enumerate(inspected.tokens) if token.loss is None] == [0, mask, len(ids) - 1]
    masked = torch.tensor([ids])
    masked[0, 2] = control.mask
    with torch.no_grad():
        expected = -inspected.forward.network(masked)[0, 2].log_softmax(-1)[ids[2]]
    assert inspected.tokens[2].loss == pytest.approx(float(expected), abs=1e-5)
    assert inspected.attributed.sum == pytest.approx(inspected.attributed.logit, abs=1e-3)
    assert inspected.lens is not None
    assert inspected.lens.ranks[-1, mask] == 0
    data = collect(inspected, [], PageOptions(corrupt="the dog [MASK]at", ablation_tokens=48), SILENT)
    assert (data["attention"]["causal"], data["causal"], data["sampling"]["position"]) == (False, False, mask)
    assert data["ablation"]["tokens"] > 0
    assert data["patching"]["heads"]["shape"] == [2, 2]
    assert tour(inspected)[-1].text.startswith("Not in this tour")


def test_patching_an_encoder_measures_the_prediction_for_a_masked_token(tmp_path: Path) -> None:
    inspected = inspect_text(_encoder_run(tmp_path, "modern"), "the cat sat")
    data = collect(inspected, [], PageOptions(corrupt="the dog sit", ablation_tokens=48), SILENT)
    at, mask = inspected.predicted_at, ControlTokens.of(inspected.run.tokenizer).mask
    top = []
    for text in ("the cat sat", "the dog sit"):
        ids = inspect_text(inspected.run, text).forward.tokens.clone()
        ids[0, at] = mask
        with torch.no_grad():
            top.append(int(inspected.forward.network(ids)[0, at].argmax()))
    names = [f"[{inspected.token_text(id)}]" for id in dict.fromkeys(top)]
    assert all(name in data["patching"]["metric"] for name in names)
    assert ("minus" in data["patching"]["metric"]) == (len(names) == 2)


def test_a_text_that_consists_of_masks_can_be_inspected(tmp_path: Path) -> None:
    inspected = inspect_text(_encoder_run(tmp_path, "modern"), "[MASK][MASK]")
    assert [token.loss for token in inspected.tokens] == [None] * 4


def test_logits_after_a_nonlinear_head_are_not_attributed(tmp_path: Path) -> None:
    inspected = inspect_text(_encoder_run(tmp_path, "bert"), "the cat sat")
    assert set(inspected.missing) == {"attribution"}
    assert "head_transform is not linear" in inspected.missing["attribution"]
    assert inspected.lens is not None
    masked = inspected.forward.tokens.clone()
    masked[0, 3] = ControlTokens.of(inspected.run.tokenizer).mask
    with torch.no_grad():
        expected = inspected.forward.model(masked)[0, 3].softmax(-1).max()
    torch.testing.assert_close(inspected.lens.probabilities[-1, 3, 0], expected, atol=1e-5, rtol=1e-5)
