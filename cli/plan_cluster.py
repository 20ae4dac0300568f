"""The parts of `tinylm plan` for several machines: the table of step times, and the files for Slurm and SkyPilot."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from .console import (
    ConsoleReporter,
    checked_output_file,
    format_count,
    format_step_time,
    parse_duration,
    print_json,
    stderr_console,
    stdout_console,
    write_stdout,
)

if TYPE_CHECKING:
    from tinylm.cost.gpu_scaling import GpuScaling, ScalingRow
    from tinylm.recipe import EmbeddingRecipe, Recipe


def parse_counts(text: str) -> list[int]:
    """Convert the value of --gpus, such as `1,8,64`, to increasing numbers. Raises `InputError` if it is invalid."""
    from tinylm.errors import InputError

    counts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= 1 for part in counts):
        raise InputError(f"must be numbers separated by commas, such as 1,8,64, not {text!r}", where="--gpus")
    return sorted({int(part) for part in counts})


def checked_devices(devices: int | None, nodes: int | None, gpus_per_node: int) -> int:
    """Return the number of accelerators from --devices, or from --nodes and --gpus-per-node."""
    from tinylm.errors import InputError

    if nodes is not None and devices is not None:
        raise InputError("mutually exclusive; with --nodes, set --gpus-per-node", where="--nodes, --devices")
    return nodes * gpus_per_node if nodes is not None else devices or 1


def show_scaling(
    recipe: Recipe,
    hardware: str,
    counts: Sequence[int],
    *,
    gpus_per_node: int,
    network_gbits: float | None,
    reporter: ConsoleReporter,
    json: bool,
) -> None:
    """Print how the step time depends on the number of accelerators."""
    from tinylm.cost.accelerators import find
    from tinylm.cost.gpu_scaling import simulate_scaling
    from tinylm.data.estimate import estimate_data_size
    from tinylm.recipe.schema import DataSection

    vocab_size, size = getattr(recipe.tokenizer, "vocab_size", None), None
    if vocab_size is None or not isinstance(recipe.data, DataSection):
        data = estimate_data_size(recipe, reporter)
        recipe, vocab_size, size = data.recipe, data.tokens.vocab_size, data.example
    table = simulate_scaling(
        recipe,
        vocab_size,
        find(hardware),
        counts,
        gpus_per_node=gpus_per_node,
        network_bandwidth=None if network_gbits is None else network_gbits * 1e9 / 8,
        size=size,
    )
    if json:
        print_json(table)
        return
    _print_table(table, counts, recipe.training.global_batch_size)


def _print_table(table: GpuScaling, counts: Sequence[int], batch: int) -> None:
    network = f"{8 * table.network_bandwidth / 1e9:,.0f} Gbit/s"
    write_stdout(f"{table.hardware}, {table.gpus_per_node} per node, {network} between nodes, {table.precision}\n")
    write_stdout(f"the recipe's batch: {batch:,} sequences, {table.strong[0].tokens_per_step:,} tokens per step")
    _print_rows(table.strong, with_tokens=False)
    left_out = [f"{count:,}" for count in counts if count not in {row.gpus for row in table.strong}]
    if left_out:
        write_stdout(f"{batch:,} sequences cannot be divided among {' or '.join(left_out)} GPUs")
    micro = table.weak[0].micro_batch_size
    write_stdout(f"\na larger batch: {micro} sequence{'s' * (micro > 1)} per GPU")
    _print_rows(table.weak, with_tokens=True)


def _print_rows(rows: Sequence[ScalingRow], *, with_tokens: bool) -> None:
    printed = Table(box=None, pad_edge=False)
    names = ["GPUs", "nodes", "parallel", *(["tokens per step"] if with_tokens else ["micro-batches"])]
    for name in (*names, "step time", "tokens/s", "MFU", "efficiency"):
        printed.add_column(name, justify="right")
    for row in rows:
        accumulation = f"{row.gradient_accumulation_steps} x {row.micro_batch_size}"
        printed.add_row(
            f"{row.gpus:,}",
            f"{row.nodes:,}",
            row.parallel if row.gpus > 1 else "-",
            f"{row.tokens_per_step:,}" if with_tokens else accumulation,
            format_step_time(row.seconds_per_step),
            format_count(row.tokens_per_second),
            f"{row.mfu:.0%}",
            f"{row.efficiency:.0%}",
        )
    stdout_console().print(printed)


@dataclass(frozen=True)
class LaunchFile:
    """A file that starts the run on a cluster."""

    file: str
    text: str


@dataclass(frozen=True)
class LaunchFiles:
    """What --sbatch and --skypilot write. None if the option was not given."""

    sbatch: LaunchFile | None = None
    skypilot: LaunchFile | None = None

    def write(self) -> None:
        from tinylm.paths import atomic_write_text

        for each, start in ((self.sbatch, "sbatch"), (self.skypilot, "sky jobs launch")):
            if each is not None:
                atomic_write_text(Path(each.file), each.text)
                stderr_console().print_line(f"wrote {each.file}; start the run with: {start} {each.file}", "dim")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def launch_files(
    recipe: str,
    loaded: Recipe | EmbeddingRecipe,
    overrides: Sequence[str],
    hardware: str | None,
    *,
    nodes: int | None,
    gpus_per_node: int,
    sbatch: str | None,
    skypilot: str | None,
    time_limit: str | None,
    overwrite: bool,
) -> LaunchFiles:
    """Return the files for --sbatch and --skypilot, without writing them. Raises `InputError` if an option is invalid."""
    from tinylm import launchers
    from tinylm.errors import InputError
    from tinylm.run import RUNS

    if sbatch is None and skypilot is None:
        if time_limit is not None:
            raise InputError("requires --sbatch", where="--time-limit")
        return LaunchFiles()
    if nodes is None or hardware is None:
        raise InputError("requires --hardware and --nodes", where="--sbatch" if sbatch is not None else "--skypilot")
    for path in (sbatch, skypilot):
        if path is not None:
            checked_output_file(path, overwrite)
    path = _relative(recipe)
    is_run = (Path(path) / "recipe.yaml").exists()
    job = launchers.ClusterJob(
        name=loaded.name,
        recipe=path,
        out=path if is_run else (RUNS / loaded.name).as_posix(),
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        overrides=overrides,
        time_limit=parse_duration(time_limit or "24h", "--time-limit") or 0,
    )
    return LaunchFiles(
        None if sbatch is None else LaunchFile(sbatch, launchers.sbatch(job)),
        None if skypilot is None else LaunchFile(skypilot, launchers.skypilot(job, hardware)),
    )


def _relative(path: str) -> str:
    """Return a path relative to the current folder if it is inside it, because machines may mount it in different places."""
    absolute = Path(os.path.expanduser(path))
    if absolute.is_absolute() and absolute.is_relative_to(Path.cwd()):
        return str(absolute.relative_to(Path.cwd()))
    return str(absolute)
