"""`tinylm runs`: the runs under a folder, with their numbers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import typer
from rich.table import Table

from .console import JSON, print_json, size, stderr, stdout

app = typer.Typer(add_completion=False)


@app.command()
def runs(folder: str = typer.Argument("runs", help="Where the runs lie."), json: bool = JSON) -> None:
    """List runs: steps, best held-out loss, bits per byte, age, size."""
    from tinylm.errors import InputError
    from tinylm.run import all_runs

    if folder != "runs" and not Path(folder).is_dir():
        raise InputError("no such folder", where=folder)
    rows = [_row(run) for run in all_runs(Path(folder))]
    if json:
        print_json(rows)
        return
    if not rows:
        stderr().say(f"no runs under {folder}/ yet: train one with `tinylm train quickstart`", "dim")
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
            size(row["bytes"]),
        )
    console = stdout()
    console.width = max(console.width, 80)  # a narrow terminal breaks the lines; it must not cut the numbers
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
        "age_seconds": time.time() - run.changed,
        "bytes": run.size(),
    }


def _age(seconds: float) -> str:
    for step, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= step:
            return f"{seconds / step:.0f} {unit}"
    return f"{seconds:.0f} s"
