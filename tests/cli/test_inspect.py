"""Test the output and the error messages of `tinylm inspect` and `tinylm explain`."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import RunCli, error_of
from inspected import HOSTILE

from tinylm.run import Run

TEXT = "The for statement is used"


def test_the_json_document_describes_tokens_heads_layers_and_checkpoints(run_cli: RunCli, tiny_run: Run) -> None:
    result = run_cli("inspect", "--text", TEXT, "--run", tiny_run.path, "--json", "--checkpoints", "all")
    document = result.json
    ids = tiny_run.tokenizer.encode(TEXT)
    assert [token["id"] for token in document["tokens"]] == ids
    assert "".join(token["text"] for token in document["tokens"]) == TEXT
    assert document["tokens"][0]["loss"] is None
    assert {"layer", "head", "previous_token", "duplicate_token", "induction"} <= set(document["heads"][0])
    assert len(document["heads"]) == 4
    lens = document["logit_lens"]
    assert (len(lens), {len(layer) for layer in lens}) == (3, {len(ids)})
    assert set(lens[0][0][0]) == {"token", "probability"}
    attribution = document["attribution"]
    assert {"position", "target", "contributions", "sum", "logit"} <= set(attribution)
    assert sum(row["logit"] for row in attribution["contributions"]) == pytest.approx(attribution["logit"], abs=1e-3)
    assert [view["step"] for view in document["checkpoints"]] == [checkpoint.step for checkpoint in tiny_run.checkpoints()]
    assert document["not_available"] == {}


def test_the_terminal_view_has_every_section_and_no_control_characters(run_cli: RunCli, tiny_run: Run) -> None:
    result = run_cli("inspect", "--text", HOSTILE, "--run", tiny_run.path)
    assert result.code == 0
    for part in ("tokens  ", "surprise", "logit lens", "heads", "not yet characteristic", "after the text", "sum; the logit is"):
        assert part in result.out
    assert not {"\x00", "\x1b", "\u202e"} & set(result.out)


def test_a_page_is_overwritten_only_with_overwrite(run_cli: RunCli, tiny_run: Run, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    written = run_cli("inspect", "--text", TEXT, "--run", tiny_run.path, "--out", file, "--ablation-tokens", "64")
    assert (written.code, written.out) == (0, "")
    assert f"wrote {file}" in written.err
    assert file.read_text().startswith("<!doctype html>")
    assert "already exists" in error_of(run_cli("explain", "--run", tiny_run.path, "--out", file))
    assert run_cli("explain", "--run", tiny_run.path, "--out", file, "--overwrite").code == 0
    assert "One gradient step" in file.read_text()


def test_the_tour_has_the_same_steps_in_the_terminal_and_in_json(run_cli: RunCli, tiny_run: Run) -> None:
    shown = run_cli("explain", "--text", TEXT, "--run", tiny_run.path).out
    document = run_cli("explain", "--text", TEXT, "--run", tiny_run.path, "--json").json
    assert [step["title"] for step in document["steps"]][:3] == ["Characters", "Tokens", "Embedding"]
    assert all(f"{number}. {step['title']}" in shown for number, step in enumerate(document["steps"], 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--text", ""), "--text: the text is empty"),
        (("--text", "a b", "--corrupt", "a c"), "--corrupt: requires --out"),
        (("--text", "a b", "--checkpoints", "first"), "--checkpoints: must be all or last N, not 'first'"),
        (("--text", "a b", "--checkpoint", "99"), "--checkpoint: no checkpoint for step 99"),
        ((), "missing option '--text'"),
    ],
)
def test_invalid_options_are_rejected(options: tuple[str, ...], message: str, run_cli: RunCli, tiny_run: Run) -> None:
    assert message in error_of(run_cli("inspect", *options, "--run", tiny_run.path))


def test_inspect_reports_a_missing_on_source_and_writes_no_page(run_cli: RunCli, tiny_run: Run, tmp_path: Path) -> None:
    options = ("--text", TEXT, "--run", tiny_run.path, "--out", tmp_path / "page.html", "--on", tmp_path / "missing.txt")
    assert "missing.txt" in error_of(run_cli("inspect", *options))
    assert not (tmp_path / "page.html").exists()
