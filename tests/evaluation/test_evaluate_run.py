"""Test the evaluation of a run on its own held-out text, and on the same text from different sources."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import pytest
import torch

from tinylm.errors import InputError
from tinylm.evaluation.evaluate_run import TextFormat, evaluate_run
from tinylm.evaluation.perplexity import EvaluationOptions
from tinylm.run import Run

TEXT = "The naïve café owner wrote: 日本語 is fine, 🦊 too.\n" * 12


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.encode())
    return path


def test_evaluating_a_run_reproduces_the_logged_evaluations(tiny_run: Run) -> None:
    logged = {line["step"]: line for line in tiny_run.metrics() if line["kind"] == "eval"}
    for name in ("best", "last"):
        result = evaluate_run(tiny_run, checkpoint=name, device="cpu")
        assert result.perplexity.loss == pytest.approx(logged[result.step]["val_loss"], rel=1e-6)
        assert result.perplexity.bits_per_byte == pytest.approx(logged[result.step]["val_bits_per_byte"], rel=1e-6)


def test_bits_per_byte_divides_by_the_size_of_the_original_text(tiny_run: Run, file: Path) -> None:
    result = evaluate_run(tiny_run, [str(file)], device="cpu").perplexity
    assert result.bytes == len(TEXT.encode())
    assert result.characters == len(TEXT)
    assert result.tokens == len(tiny_run.tokenizer.encode(TEXT))
    assert result.bits_per_byte == pytest.approx(result.nats / math.log(2) / len(TEXT.encode()))
    assert result.bits_per_character == pytest.approx(result.nats / math.log(2) / len(TEXT))
    assert result.perplexity == pytest.approx(math.exp(result.nats / result.tokens))


def test_the_first_token_is_predicted_from_the_end_of_text_token(tiny_run: Run, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("The for statement")
    network = tiny_run.network(tiny_run.checkpoint("best"), torch.device("cpu"))
    ids = torch.tensor([[tiny_run.tokenizer.end_of_text, *tiny_run.tokenizer.encode("The for statement")]])
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(network(ids[:, :-1])[0], ids[0, 1:], reduction="sum")
    assert evaluate_run(tiny_run, [str(path)], device="cpu").perplexity.nats == pytest.approx(float(expected), rel=1e-5)


def test_the_same_text_has_the_same_perplexity_from_any_source(tiny_run: Run, file: Path, tmp_path: Path) -> None:
    compressed = tmp_path / "text.txt.gz"
    compressed.write_bytes(gzip.compress(TEXT.encode()))
    lines = tmp_path / "text.jsonl"
    lines.write_text(json.dumps({"body": TEXT}) + "\n")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_bytes(TEXT.encode())
    expected = evaluate_run(tiny_run, [str(file)], device="cpu").perplexity
    for source in (compressed, lines, folder):
        text_format = TextFormat(field="body" if source is lines else "text")
        assert evaluate_run(tiny_run, [str(source)], text_format=text_format, device="cpu").perplexity == expected


def test_two_sources_are_separate_documents(tiny_run: Run, file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("Another text.")
    both = evaluate_run(tiny_run, [str(file), str(other)], device="cpu").perplexity
    separate = [evaluate_run(tiny_run, [str(path)], device="cpu").perplexity for path in (file, other)]
    assert both.documents == 2
    assert both.nats == pytest.approx(sum(result.nats for result in separate), rel=1e-6)


def test_context_and_stride_change_the_loss(tiny_run: Run, file: Path) -> None:
    result = evaluate_run(tiny_run, [str(file)], options=EvaluationOptions(context=8, stride=2), device="cpu").as_dict()
    assert (result["context"], result["stride"]) == (8, 2)
    default = evaluate_run(tiny_run, [str(file)], device="cpu").as_dict()
    assert (default["context"], default["stride"]) == (32, 32)
    assert result["loss"] != default["loss"]


def test_the_json_output_has_every_key(tiny_run: Run) -> None:
    result = evaluate_run(tiny_run, device="cpu").as_dict()
    assert set(result) >= {
        *("run", "checkpoint", "step", "documents", "tokens", "bytes", "characters", "loss", "perplexity", "bits_per_byte"),
        *("bits_per_character", "bits_per_byte_ci95", "context", "stride"),
    }
    assert json.loads(json.dumps(result)) == result


@pytest.mark.parametrize("context", [0, 33])
def test_a_context_out_of_range_is_rejected(tiny_run: Run, context: int) -> None:
    with pytest.raises(InputError, match="1 to 32") as caught:
        evaluate_run(tiny_run, options=EvaluationOptions(context=context), device="cpu")
    assert caught.value.where == "--context"


def test_an_empty_text_is_rejected(tiny_run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(InputError, match="empty"):
        evaluate_run(tiny_run, [str(tmp_path / "empty.txt")], device="cpu")
