"""Test the evaluation of ensembles, which average the probabilities of several models."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import add_noise_, section
from torch import Tensor
from untrained_runs import save_run

from tinylm.data.prepare import encode_to_shard
from tinylm.ensemble import Ensemble
from tinylm.errors import InputError
from tinylm.evaluation.comparison import compare_runs
from tinylm.evaluation.evaluate_run import BreakdownOptions, evaluate_ensemble, evaluate_run
from tinylm.evaluation.perplexity import EvaluationOptions
from tinylm.evaluation.scoring import ensemble_losses, mean_logprobs, mean_probabilities
from tinylm.model import registry
from tinylm.model.transformer import Transformer
from tinylm.recipe.encoder import MaskedLMObjective
from tinylm.recipe.recurrent import GruSection
from tinylm.run import Run
from tinylm.text.sources import Piece

MakeRun = Callable[..., Run]


@pytest.fixture(scope="module")
def file(english: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(english[10_000:11_500], encoding="utf-8")
    return path


@pytest.fixture
def make_run(tmp_path: Path, tiny_run: Run) -> MakeRun:
    """`make_run("a", seed=1, context_length=8)` creates an untrained run with the tokenizer of the tiny run."""

    def make(name: str, *, seed: int = 0, **parts: Any) -> Run:
        network = Transformer(section("modern", **parts), tiny_run.tokenizer.vocab_size, seed=seed)
        return save_run(tmp_path / name, add_noise_(network, seed), tiny_run.tokenizer)

    return make


def _gru_run(folder: Path, tiny_run: Run, seed: int) -> Run:
    model = GruSection(n_layer=1, n_embd=16, context_length=8, burn_in=0)
    network = registry.build(model, tiny_run.tokenizer.vocab_size, seed)
    return save_run(folder, network, tiny_run.tokenizer)  # type: ignore[arg-type]


def _tokens(run: Run, file: Path) -> Tensor:
    """The end-of-text token and the tokens of a text, (1, T)."""
    end_of_text = run.tokenizer.end_of_text
    assert end_of_text is not None
    return torch.tensor([[end_of_text, *run.tokenizer.encode(file.read_text(encoding="utf-8"))]])


def _mean_loss(runs: list[Run], file: Path, context: int | None) -> float:
    """Return the loss of the mean of the probabilities, computed in float64 with a forward pass per window."""
    networks = [run.network(run.checkpoint(), torch.device("cpu")).double() for run in runs]
    tokens = _tokens(runs[0], file)
    context = context or tokens.shape[1]
    losses = []
    for start in range(0, tokens.shape[1] - 1, context):
        window, targets = tokens[:, start : start + context], tokens[0, start + 1 : start + 1 + context]
        probabilities = []
        for network in networks:
            with torch.no_grad():
                logits = network(window[:, : len(targets)])
            probabilities.append(logits.softmax(dim=-1)[0, torch.arange(len(targets)), targets])
        losses.append(-torch.stack(probabilities).mean(dim=0).log())
    return float(torch.cat(losses).mean())


def test_the_mean_of_probabilities_is_not_the_mean_of_logits() -> None:
    logits = [torch.tensor([[2.0, 0.0, -1.0]], dtype=torch.float64), torch.tensor([[-3.0, 1.0, 4.0]], dtype=torch.float64)]
    mean = mean_logprobs(logits)
    torch.testing.assert_close(mean.exp(), (logits[0].softmax(-1) + logits[1].softmax(-1)) / 2)
    assert float((mean - torch.stack(logits).mean(0).log_softmax(-1)).abs().max()) > 0.1
    torch.testing.assert_close(mean_probabilities(logits), mean.exp())
    assert torch.equal(mean_logprobs(logits[:1]), logits[0].log_softmax(-1))
    assert torch.equal(mean_probabilities(logits[:1]), logits[0].softmax(-1))


def test_very_unlikely_tokens_have_a_finite_loss_in_an_ensemble() -> None:
    losses = ensemble_losses([np.array([2000.0, 1.0, np.nan]), np.array([3000.0, 1.0, np.nan])])
    assert losses[:2] == pytest.approx([2000 + math.log(2), 1.0])
    assert math.isnan(losses[2])


def test_an_ensemble_of_one_run_equals_the_run_exactly(make_run: MakeRun, file: Path) -> None:
    run = make_run("a")
    alone = evaluate_run(run, [str(file)], device="cpu")
    copy = make_run("copy")  # the mean of a model and an identical one
    twice = evaluate_ensemble(Ensemble.of([run, copy]), [str(file)], device="cpu")
    assert evaluate_ensemble(Ensemble.of([run]), [str(file)], device="cpu") == alone
    assert [member.perplexity for member in twice.members] == [alone.perplexity] * 2
    assert twice.perplexity.nats == pytest.approx(alone.perplexity.nats, rel=1e-14)
    assert twice.perplexity.bits_per_byte_ci95 == pytest.approx(alone.perplexity.bits_per_byte_ci95, rel=1e-14)


def test_the_loss_is_that_of_the_mean_probabilities_in_float64(make_run: MakeRun, file: Path) -> None:
    runs = [make_run("a", seed=1), make_run("b", seed=2), make_run("c", seed=3, n_layer=1)]
    result = evaluate_ensemble(Ensemble.of(runs), [str(file)], device="cpu")
    assert result.perplexity.loss == pytest.approx(_mean_loss(runs, file, 16), rel=1e-6)
    assert result.perplexity.loss < min(member.perplexity.loss for member in result.members)
    for member, run in zip(result.members, runs, strict=True):
        assert member.perplexity == evaluate_run(run, [str(file)], device="cpu").perplexity


def test_all_members_use_the_smallest_context(make_run: MakeRun, file: Path) -> None:
    runs = [make_run("a", seed=1, context_length=16), make_run("b", seed=2, context_length=8)]
    result = evaluate_ensemble(Ensemble.of(runs), [str(file)], device="cpu")
    assert result.perplexity.context == 8
    assert result.perplexity.loss == pytest.approx(_mean_loss(runs, file, 8), rel=1e-6)
    with pytest.raises(InputError, match="must be 1 to 8"):
        evaluate_ensemble(Ensemble.of(runs), [str(file)], options=EvaluationOptions(context=16), device="cpu")


def test_recurrent_members_carry_their_state_unless_another_member_cannot(
    make_run: MakeRun, tiny_run: Run, file: Path, tmp_path: Path
) -> None:
    recurrent = [_gru_run(tmp_path / f"gru{seed}", tiny_run, seed) for seed in (1, 2)]
    carried = evaluate_ensemble(Ensemble.of(recurrent), [str(file)], device="cpu").perplexity
    assert carried.context is None
    assert carried.loss == pytest.approx(_mean_loss(recurrent, file, None), rel=1e-6)
    mixed = [recurrent[0], make_run("a", context_length=16)]
    windows = evaluate_ensemble(Ensemble.of(mixed), [str(file)], device="cpu").perplexity
    assert windows.context == 8
    assert windows.loss == pytest.approx(_mean_loss(mixed, file, 8), rel=1e-6)


def test_the_ensemble_is_compared_with_its_best_member(make_run: MakeRun, file: Path) -> None:
    runs = [make_run("a", seed=1), make_run("b", seed=2)]
    result = evaluate_ensemble(Ensemble.of(runs), [str(file)], device="cpu")
    assert result.best_member is not None
    assert result.best_member.comparison is not None
    best = min(result.members, key=lambda member: member.perplexity.loss)
    assert result.best_member.score == best
    difference = result.perplexity.bits_per_byte - best.perplexity.bits_per_byte
    assert result.best_member.comparison.difference == pytest.approx(difference)
    low, high = result.best_member.comparison.ci95
    assert low < difference < high
    document = result.as_dict()
    assert [member["run"] for member in document["members"]] == [str(run.path) for run in runs]  # type: ignore[attr-defined]


def test_breakdowns_of_an_ensemble_add_up_to_its_loss(make_run: MakeRun, file: Path) -> None:
    runs = [make_run("a", seed=1), make_run("b", seed=2)]
    details = BreakdownOptions(by_position=True, by_document=True, hardest=3)
    result = evaluate_ensemble(Ensemble.of(runs), [str(file)], details=details, device="cpu")
    for rows in result.tables.values():
        assert sum(row.tokens * row.loss for row in rows) == pytest.approx(result.perplexity.nats)
    assert len(result.hardest) == 3


def test_an_ensemble_can_be_compared_with_a_run(make_run: MakeRun, file: Path) -> None:
    runs = [make_run("a", seed=1), make_run("b", seed=2)]
    ensemble = Ensemble.of(runs)
    comparison = compare_runs([runs[0], ensemble], [str(file)], device="cpu")
    [test] = comparison.model_tests
    assert test.b.path == f"{runs[0].path}+{runs[1].path}"
    assert test.result.a == pytest.approx(evaluate_run(runs[0], [str(file)], device="cpu").perplexity.bits_per_byte)
    assert test.result.b == pytest.approx(evaluate_ensemble(ensemble, [str(file)], device="cpu").perplexity.bits_per_byte)


def test_checkpoints_of_one_run_form_an_ensemble(make_run: MakeRun, file: Path) -> None:
    run, other = make_run("a", seed=1), make_run("b", seed=2)
    shutil.copytree(other.checkpoint().path, run.path / "checkpoints" / "step-000005")
    snapshots = Ensemble.of([run], ["0", "5"])
    expected = evaluate_ensemble(Ensemble.of([run, other]), [str(file)], device="cpu").perplexity
    assert evaluate_ensemble(snapshots, [str(file)], device="cpu").perplexity == expected
    assert Ensemble.open(snapshots.name).checkpoint == snapshots.checkpoint == "step-000000+step-000005"


def test_the_members_of_an_ensemble_must_share_their_tokenizer(make_run: MakeRun, tiny_run: Run, tmp_path: Path) -> None:
    run = make_run("a")
    assert not Ensemble.of([run, tiny_run]).is_single  # the same tokenizer in two files
    shutil.copytree(run.path, tmp_path / "b")
    edited = (tmp_path / "b" / "tokenizer.json").read_text(encoding="utf-8").replace('"<|endoftext|>"', '"<|end_of_text|>"')
    (tmp_path / "b" / "tokenizer.json").write_text(edited, encoding="utf-8")
    with pytest.raises(InputError, match="its tokenizer differs from that of"):
        Ensemble.of([run, Run.open(tmp_path / "b")])


def test_a_model_cannot_occur_in_an_ensemble_twice(make_run: MakeRun) -> None:
    run = make_run("a")
    with pytest.raises(InputError, match="is in the ensemble twice"):
        Ensemble.of([run, Run.open(run.path / "checkpoints" / "step-000000")])


def test_several_checkpoints_require_a_single_run(make_run: MakeRun) -> None:
    with pytest.raises(InputError, match="several checkpoints require a single run"):
        Ensemble.of([make_run("a"), make_run("b")], ["best", "last"])


def test_only_language_models_form_an_ensemble(make_run: MakeRun) -> None:
    run, other = make_run("a"), make_run("b")
    recipe = other.recipe.model_copy(update={"objective": MaskedLMObjective()})
    other.__dict__["recipe"] = recipe
    with pytest.raises(InputError, match="trained with the masked_lm objective"):
        Ensemble.of([run, other])


def test_the_members_must_have_the_same_heldout_text(tiny_run: Run, tmp_path: Path) -> None:
    shutil.copytree(tiny_run.path, tmp_path / "copy")
    copy = Run.open(tmp_path / "copy")
    ensemble = Ensemble.of([tiny_run, copy])
    own = evaluate_ensemble(ensemble, device="cpu")
    assert own.perplexity.nats == pytest.approx(evaluate_run(tiny_run, device="cpu").perplexity.nats, rel=1e-12)
    assert own.chosen_by_split
    piece = Piece("another held-out text", True)
    encode_to_shard(tmp_path / "copy" / "heldout", "heldout", iter([piece]), tiny_run.tokenizer, lambda characters: None)
    with pytest.raises(InputError, match="its held-out text differs from that of"):
        evaluate_ensemble(Ensemble.of([tiny_run, Run.open(tmp_path / "copy")]), device="cpu")


def test_an_html_report_requires_a_single_model(make_run: MakeRun, file: Path, tmp_path: Path) -> None:
    details = BreakdownOptions(html=tmp_path / "report.html")
    with pytest.raises(InputError, match="shows the predictions of a single model"):
        evaluate_ensemble(Ensemble.of([make_run("a"), make_run("b", seed=1)]), [str(file)], details=details, device="cpu")
