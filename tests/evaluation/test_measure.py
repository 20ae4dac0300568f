"""Measuring a run: its own held-out text, and the same text however it comes."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import pytest
import torch

from tinylm.errors import InputError
from tinylm.evaluation.measure import measure
from tinylm.run import Run

TEXT = "The naïve café owner wrote: 日本語 is fine, 🦊 too.\n" * 12


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.encode())
    return path


def test_a_run_measures_what_its_training_measured(tiny_run: Run) -> None:
    logged = {line["step"]: line for line in tiny_run.metrics() if line["kind"] == "eval"}
    for which in ("best", "last"):
        found = measure(tiny_run, checkpoint=which, device="cpu")
        assert found.perplexity.loss == pytest.approx(logged[found.step]["val_loss"], rel=1e-6)
        assert found.perplexity.bits_per_byte == pytest.approx(logged[found.step]["val_bits_per_byte"], rel=1e-6)


def test_bits_per_byte_divides_by_the_bytes_of_the_text_itself(tiny_run: Run, file: Path) -> None:
    found = measure(tiny_run, [str(file)], device="cpu").perplexity
    assert found.bytes == len(TEXT.encode())
    assert found.characters == len(TEXT)
    assert found.tokens == len(tiny_run.tokenizer.encode(TEXT))
    assert found.bits_per_byte == pytest.approx(found.nats / math.log(2) / len(TEXT.encode()))
    assert found.bits_per_character == pytest.approx(found.nats / math.log(2) / len(TEXT))
    assert found.perplexity == pytest.approx(math.exp(found.nats / found.tokens))


def test_the_loss_of_a_file_is_that_of_its_tokens_after_the_end_of_text(tiny_run: Run, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("The for statement")
    network = tiny_run.network(tiny_run.checkpoint("best"), torch.device("cpu"))
    ids = torch.tensor([[tiny_run.tokenizer.end_of_text, *tiny_run.tokenizer.encode("The for statement")]])
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(network(ids[:, :-1])[0], ids[0, 1:], reduction="sum")
    assert measure(tiny_run, [str(path)], device="cpu").perplexity.nats == pytest.approx(float(expected), rel=1e-5)


def test_a_text_measures_the_same_from_any_source(tiny_run: Run, file: Path, tmp_path: Path) -> None:
    packed = tmp_path / "text.txt.gz"
    packed.write_bytes(gzip.compress(TEXT.encode()))
    lines = tmp_path / "text.jsonl"
    lines.write_text(json.dumps({"body": TEXT}) + "\n")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_bytes(TEXT.encode())
    expected = measure(tiny_run, [str(file)], device="cpu").perplexity
    for source in (packed, lines, folder):
        assert measure(tiny_run, [str(source)], field="body", device="cpu").perplexity == expected


def test_two_sources_are_two_documents(tiny_run: Run, file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("Another text.")
    both = measure(tiny_run, [str(file), str(other)], device="cpu").perplexity
    alone = [measure(tiny_run, [str(path)], device="cpu").perplexity for path in (file, other)]
    assert both.documents == 2
    assert both.nats == pytest.approx(sum(found.nats for found in alone), rel=1e-6)


def test_a_shorter_context_and_stride_are_used(tiny_run: Run, file: Path) -> None:
    found = measure(tiny_run, [str(file)], context=8, stride=2, device="cpu").as_dict()
    assert (found["context"], found["stride"]) == (8, 2)
    whole = measure(tiny_run, [str(file)], device="cpu").as_dict()
    assert (whole["context"], whole["stride"]) == (32, 32)
    assert found["loss"] != whole["loss"]


def test_the_document_for_programs_has_every_key(tiny_run: Run) -> None:
    found = measure(tiny_run, device="cpu").as_dict()
    assert set(found) >= {
        *("run", "checkpoint", "step", "documents", "tokens", "bytes", "characters", "loss", "perplexity", "bits_per_byte"),
        *("bits_per_character", "bits_per_byte_ci95", "context", "stride"),
    }
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("context", [0, 33])
def test_a_context_that_does_not_fit_is_refused(tiny_run: Run, context: int) -> None:
    with pytest.raises(InputError, match="1 to 32") as caught:
        measure(tiny_run, context=context, device="cpu")
    assert caught.value.where == "--context"


def test_an_empty_text_is_refused(tiny_run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(InputError, match="empty"):
        measure(tiny_run, [str(tmp_path / "empty.txt")], device="cpu")
