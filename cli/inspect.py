"""`tinylm inspect`: show what a model does with a text, in the terminal, as JSON or as one offline HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from tinylm.errors import InputError

from .console import (
    CHECKPOINT,
    DEVICE,
    JSON,
    QUIET,
    RUN,
    THREADS,
    ConsoleReporter,
    checked_output_file,
    checked_text,
    format_size,
    open_run,
    print_json,
    stderr_console,
)

if TYPE_CHECKING:
    from tinylm.inspection.learning import CheckpointView
    from tinylm.inspection.overview import Inspection

app = typer.Typer(add_completion=False)


@app.command()
def inspect(
    text: str = typer.Option(..., "--text", "-t", help="The text to run the model on."),
    run: str | None = RUN,
    checkpoint: str | None = CHECKPOINT,
    out: str | None = typer.Option(
        None, "--out", "-o", help="Write one HTML page that works offline. Default: print to the terminal."
    ),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace an existing file."),
    checkpoints: str | None = typer.Option(
        None,
        "--checkpoints",
        metavar="all|last N",
        help="Also compare checkpoints to show how the model learned: all saved ones, or the last N.",
    ),
    corrupt: str | None = typer.Option(
        None, "--corrupt", help="With --out: a second text with the same number of tokens, for activation patching."
    ),
    on: list[str] | None = typer.Option(
        None, "--on", metavar="SOURCE", help="With --out: text for ablations and neurons. Default: the run's held-out text."
    ),
    ablation_tokens: int | None = typer.Option(
        None,
        "--ablation-tokens",
        min=0,
        help="With --out: number of tokens to measure ablations on; 0 skips ablations. Default: as many as take a few seconds.",
    ),
    position: int | None = typer.Option(
        None,
        "--position",
        help="Attribute the prediction after this token, counted from 0, or at this token for an encoder. Default: the last token, "
        "the first [MASK], or the start of a translation.",
    ),
    target: str | None = typer.Option(
        None, "--target", help="Attribute the logit of this token (text or @ID) or label. Default: the most likely one."
    ),
    translation: str | None = typer.Option(
        None, "--translation", help="For a translation model: the translation to inspect. Default: its own greedy translation."
    ),
    to: str = typer.Option("", "--to", metavar="LANGUAGE", help="The target language, for a model with several target languages."),
    max_tokens: int | None = typer.Option(None, "--max-tokens", help="Maximum number of tokens to inspect. Default: 128."),
    start_of_document: bool = typer.Option(
        False, "--start-of-document", help="Put the end-of-text token before the text, as in training and evaluation."
    ),
    verify: bool = typer.Option(False, "--verify", help="Compare with transformer-lens, and print the largest differences."),
    device: str = DEVICE,
    threads: int | None = THREADS,
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Look inside a model: tokens, attention, logit lens, contributions to a prediction, and the effects of its parts.

    Decoders, encoders, classifiers and translation models are supported. In a text for an encoder, [MASK] stands for a masked
    token.
    """
    checked_text(text, "--text")
    if translation is not None:
        checked_text(translation, "--translation")
    page_only = {"--corrupt": corrupt, "--on": on, "--ablation-tokens": ablation_tokens}
    unused = [option for option, value in page_only.items() if value not in (None, [])]
    if out is None and unused:
        raise InputError("requires --out", where=", ".join(unused))
    file = None if out is None else checked_output_file(out, overwrite)
    console = stderr_console()
    reporter = ConsoleReporter(console, quiet=quiet)
    opened = open_run(run, console, quiet=quiet)
    opened.checkpoint(checkpoint)  # report a missing checkpoint before torch is imported

    from tinylm.device import set_threads
    from tinylm.inspection.input import InspectOptions
    from tinylm.inspection.overview import inspect_text

    set_threads(threads)
    options = InspectOptions(max_tokens, position, target, start_of_document, translation, to)
    result = inspect_text(opened, text, options, checkpoint=checkpoint, device=device, reporter=reporter)
    views = _views(result, checkpoints, device, reporter) if checkpoints else []
    differences = _verify(result) if verify else {}
    if file is not None:
        from tinylm.inspection.page import PageOptions, render

        page_options = PageOptions(
            None if corrupt is None else checked_text(corrupt, "--corrupt"), tuple(on or ()), ablation_tokens
        )
        page = render(result, views, page_options, reporter)
        _write(file, page)
        console.print_line(f"wrote {file} ({format_size(len(page.encode()))})", "dim")
    if json:
        extra = {"checkpoints": [view.as_dict() for view in views]} if views else {}
        print_json({**result.as_dict(), **extra, **({"transformer_lens": differences} if verify else {})})
    elif file is None:
        from .inspect_view import print_inspection

        print_inspection(result, views)
    if verify and not json:
        for name, difference in differences.items():
            print(f"{name:<14}  largest difference from transformer-lens {difference:.2g}")


def _views(result: Inspection, which: str, device: str, reporter: ConsoleReporter) -> list[CheckpointView]:
    from tinylm.inspection.learning import pattern_tokens, select_checkpoints, view_checkpoints

    run, given = result.run, result.input
    chosen = select_checkpoints(run, which)
    shown = pattern_tokens(run, len(given.ids), len(chosen))
    return view_checkpoints(run, given.ids, chosen, given.source, pattern_tokens=shown, device=device, reporter=reporter)


def _verify(result: Inspection) -> dict[str, float]:
    if result.forward.task != "causal_lm":
        raise InputError("requires a model that predicts the next token", where="--verify", hint="omit it")
    from tinylm.interchange.transformer_lens import largest_differences

    return largest_differences(result.forward.model, result.run.tokenizer, result.input.ids)


def _write(file: Path, page: str) -> None:
    from tinylm.paths import atomic_write_text

    atomic_write_text(file, page)
