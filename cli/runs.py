"""`tinylm runs`: list the runs in a folder."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import typer
from rich.table import Table

from .console import JSON, format_size, print_json, stderr_console, stdout_console

app = typer.Typer(add_completion=False)


@app.command()
def runs(folder: str = typer.Argument("runs", help="The folder that contains the runs."), json: bool = JSON) -> None:
    """List runs with their steps, best held-out loss, bits per byte, age and size."""
    from tinylm.errors import InputError
    from tinylm.run import all_runs

    if folder != "runs" and not Path(folder).is_dir():
        raise InputError("no such folder", where=folder)
    rows = [_row(run) for run in all_runs(Path(folder))]
    if json:
        print_json(rows)
        return
    if not rows:
        stderr_console().print_line(f"no runs in {folder}/ yet: train one with `tinylm train quickstart`", "dim")
        return
    table = Table("name", box=None, pad_edge=False)
    for column in ("steps", "held-out loss", "bits per byte", "age", "size"):
        table.add_column(column, justify="right")
    for row in rows:
        loss, bits = row["best_val_loss"], row["best_val_bits_per_byte"]
        table.add_row(
            row["name"],
            f"{row['step']:,}",
            "-" if loss is None else f"{loss:.4f}",
            "-" if bits is None else f"{bits:.4f}",
            _age(row["age_seconds"]),
            format_size(row["bytes"]),
        )
    console = stdout_console()
    console.width = max(console.width, 80)  # on a narrow terminal, wrapped lines are better than truncated numbers
    console.print(table)


def _row(run: Any) -> dict[str, Any]:
    lines = list(run.metrics())
    evaluations = [line for line in lines if line["kind"] == "eval"]
    best = min(evaluations, key=lambda line: line["val_loss"], default=None)
    return {
        "name": run.name,
        "run": str(run.path),
        "step": max((line["step"] for line in lines), default=0),
        "best_step": best["step"] if best else None,
        "best_val_loss": best["val_loss"] if best else None,
        "best_val_bits_per_byte": best["val_bits_per_byte"] if best else None,
        "age_seconds": time.time() - run.modified_at,
        "bytes": run.size(),
    }


def _age(seconds: float) -> str:
    for step, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= step:
            return f"{seconds / step:.0f} {unit}"
    return f"{seconds:.0f} s"
