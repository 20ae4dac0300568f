"""How fast one GPU trains and decodes: every way of computing beside the plain one, in turn, with ratios.

python benchmarks/gpu.py [--model gpt2-124m|small] [--batch N] [--parts training optimizers decoding] [--json]

The tokens are random: speed does not depend on them. One network and one optimiser serve all rows of the first table, so that
the peak memory of a row is its own. A row that runs out of memory says so, and the rest goes on.
`--device cpu --tiny` only shows that the script works.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import torch

from tinylm.cost.accelerators import Accelerator, find
from tinylm.cost.plan import flops_per_token
from tinylm.data.batches import Batches
from tinylm.device import describe
from tinylm.errors import InputError
from tinylm.generation.engine import generate
from tinylm.generation.sampling import SamplingOptions
from tinylm.model.decoder import Decoder
from tinylm.model.objective import CausalObjective
from tinylm.model.transformer import Transformer
from tinylm.optim import groups
from tinylm.recipe.schema import AdamWOptimizer, ModelSection, MuonOptimizer, Optimizer
from tinylm.reporting import CollectingReporter
from tinylm.tokenizer import Tokenizer
from tinylm.training.compilation import Trial, compile_blocks
from tinylm.training.feed import Feed
from tinylm.training.out_of_memory import is_out_of_memory
from tinylm.training.precision import Precision
from tinylm.training.step import accumulate

SHEETS = {
    "B200": "b200",
    "H200": "h200",
    "H100 80GB HBM3": "h100-sxm",
    "H100 PCIe": "h100-pcie",
    "A100-SXM4-80GB": "a100-80gb-sxm",
    "A100 80GB PCIe": "a100-80gb-pcie",
    "A100-SXM4-40GB": "a100-40gb-sxm",
    "A100-PCIE-40GB": "a100-40gb-sxm",  # the same multipliers, and only they are read here
    "V100-SXM2-32GB": "v100-sxm2-32gb",
    "V100-SXM2-16GB": "v100-sxm2-32gb",  # likewise
    "L40S": "l40s",
    "L4": "l4",
    "T4": "t4",
    "A10G": "a10g",
    "RTX 4090": "rtx-4090",
    "RTX 3090": "rtx-3090",
}
"""Whole names, as the driver gives them without the maker: variants such as "RTX 4090 D" or a slice of a card are other devices."""
MODES = ("fp32", "tf32", "bf16", "fp16")
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PLAIN = "plain"
Call = Callable[..., Any]
ONE_GRAPH = "not yet: a graph repeats fixed shapes and addresses, but the cache's slices and the positions grow with every token"
"""One step at one position can be recorded, and is: that row shows what graphs would save."""


@dataclass(frozen=True)
class Setting:
    """What is measured, and how often."""

    model: ModelSection
    vocab_size: int
    batch: int
    """Sequences per optimiser step."""
    rounds: int
    steps: int
    """Steps between two looks at the clock."""
    peak_width: int
    new_tokens: int


def setting(name: str, *, tiny: bool, batch: int | None) -> Setting:
    if tiny:
        preset = "gpt2" if name == "gpt2-124m" else "modern"
        shape = {"preset": preset, "n_layer": 2, "n_head": 2, "n_embd": 32, "context_length": 32}
        return Setting(ModelSection.model_validate(shape), 128, batch or 4, rounds=2, steps=1, peak_width=64, new_tokens=8)
    if name == "gpt2-124m":
        shape = {"preset": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768, "context_length": 1024}
        return Setting(ModelSection.model_validate(shape), 50_304, batch or 16, rounds=5, steps=4, peak_width=8192, new_tokens=256)
    return Setting(ModelSection(), 4096, batch or 64, rounds=7, steps=10, peak_width=8192, new_tokens=200)  # type: ignore[call-arg]


@dataclass(frozen=True)
class Side:
    """One way to make the same step. `parts`: micro-batches that the batch is cut into."""

    name: str
    compiled: bool = False
    recompute: bool = False
    parts: int = 1


SIDES = (
    Side(PLAIN),
    Side("compiled", compiled=True),
    Side("checkpointing", recompute=True),
    Side("compiled, checkpointing", compiled=True, recompute=True),
    Side("4 micro-batches", parts=4),
    Side("compiled, 4 micro-batches", compiled=True, parts=4),
)


@dataclass
class StepRow:
    """One side in one mode. Milliseconds are those of an optimiser step, the median of the rounds; shares of peaks are MFU."""

    mode: str
    side: str
    milliseconds: float | None = None
    tokens_per_second: float | None = None
    mfu_sheet: float | None = None
    mfu_measured: float | None = None
    peak_bytes: int | None = None
    speed_of_plain: float | None = None
    """Times as fast as the plain side of the same mode."""
    memory_of_plain: float | None = None
    speed_of_fp32: float | None = None
    """Times as fast as the same side in fp32."""
    failed: str | None = None


@dataclass
class OptimizerRow:
    name: str
    milliseconds: float | None = None
    state_bytes: int | None = None
    time_of_adamw: float | None = None
    failed: str | None = None


@dataclass
class DecodeRow:
    """Tokens per second of all sequences together. `ratio`: to the eager step of the same weights and batch."""

    weights: str
    batch: int
    what: str
    tokens_per_second: float | None = None
    ratio: float | None = None
    failed: str | None = None


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], repeat: int, device: torch.device) -> float:
    """Of one call, in a run of `repeat` between two waits for the device, as a training runs from one logged step to the next."""
    wait(device)
    start = time.perf_counter()
    for _ in range(repeat):
        work()
    wait(device)
    return (time.perf_counter() - start) / repeat


def without_memory(work: Callable[[], None]) -> str | None:
    """Run it; None, or what to say where memory ran out. What it had taken is given back either way."""
    failed = None
    try:
        work()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        failed = "out of memory"
    if failed is not None:  # after the exception, which held the frames and so the tensors
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return failed


def in_turn(
    sides: dict[str, Callable[[], object]], *, rounds: int, steps: int, warm_up: int, device: torch.device
) -> tuple[dict[str, float], dict[str, int], dict[str, str]]:
    """Every side warmed up, then all sides once per round: median seconds, peak bytes, and why a side has neither."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    peaks: dict[str, int] = {}
    failed: dict[str, str] = {}
    for round_ in range(-1, rounds):
        for name, work in sides.items():
            if name in failed:
                continue
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)

            def measure(name: str = name, work: Callable[[], object] = work, warming: bool = round_ < 0) -> None:
                seconds = seconds_of(work, warm_up if warming else steps, device)
                if not warming:
                    times[name].append(seconds)

            problem = without_memory(measure)
            if problem is not None:
                failed[name] = problem
            elif device.type == "cuda" and round_ >= 0:  # the first calls may compile and choose kernels
                peaks[name] = max(peaks.get(name, 0), torch.cuda.max_memory_allocated(device))
    return {name: statistics.median(found) for name, found in times.items() if found and name not in failed}, peaks, failed


def has(mode: str, device: torch.device) -> bool:
    """Whether the device has units for these numbers; the CPU runs everything, to show that it runs."""
    if device.type != "cuda" or mode in ("fp32", "fp16"):
        return True
    if mode == "tf32":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def precision_of(mode: str, device: torch.device) -> Precision:
    return Precision("fp32" if mode == "tf32" else mode, device)


def products(mode: str, precision: Precision) -> AbstractContextManager[None]:
    """As the trainer computes them; but `fp32` here means float32, where the trainer lets a GPU round to TF32."""
    return nullcontext() if mode == "fp32" else precision.tf32()


def measured_peak(mode: str, width: int, device: torch.device) -> float:
    """FLOP/s of the best of several large products of random numbers; with constants a GPU draws less power and runs faster."""
    a, b = (torch.randn(width, width, device=device).to(DTYPES[mode]) for _ in range(2))
    with products(mode, precision_of(mode, device)):
        seconds_of(lambda: a @ b, 3, device)
        best = min(seconds_of(lambda: a @ b, 3, device) for _ in range(5))
    return 2 * width**3 / best


def sheet_of(device: torch.device, named: str | None) -> Accelerator | None:
    """The data sheet of `named`, or of the GPU that is here. Raises `InputError` for a name without one."""
    if named is not None:
        return find(named)
    if device.type != "cuda":
        return None
    name = describe(device)
    for prefix in ("NVIDIA ", "Tesla ", "GeForce "):
        name = name.removeprefix(prefix)
    return find(SHEETS[name]) if name in SHEETS else None


class Training:
    """One network, its optimiser and its batches; makes the step that the trainer makes, in any mode and on any side."""

    def __init__(self, setting: Setting, device: torch.device, feed: Feed) -> None:
        self.setting = setting
        self.device = device
        self.objective = CausalObjective()
        self.network = Transformer(setting.model, setting.vocab_size, seed=0).to(device)
        self.optimizers = groups.build(AdamWOptimizer(name="adamw", lr=1e-5), self.network, self.network.stacked_matrices())
        self._feed = feed
        self._position = 0

    def step(self, mode: str, side: Side, precision: Precision, scaler: torch.amp.GradScaler) -> torch.Tensor:
        """The mean loss, still on the device."""
        size = self.setting.batch
        batch = self._feed.take(self._position, size)
        self._position += size
        self.optimizers.zero_grad()
        with products(mode, precision):
            loss = accumulate(self.network, self.objective, batch, size // side.parts, precision, scaler)
        scaler.unscale_(self.optimizers)  # type: ignore[arg-type]  # groups and a step are all it needs
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizers.step(torch.stack((loss, norm)).isfinite().all())
        scaler.update()
        return loss

    @contextmanager
    def on(self, side: Side, compiled: Sequence[Call | None]) -> Iterator[None]:
        """The network as the side wants it. `compiled` are the blocks' compiled calls: eager means as if there were none."""
        self.network.recompute = side.recompute
        for block, call in zip(self.network.blocks, compiled, strict=True):
            block._compiled_call_impl = call if side.compiled else None
        try:
            yield
        finally:
            self.network.recompute = False

    def compiled_calls(self, mode: str, precision: Precision) -> tuple[list[Call | None], str | None]:
        """The compiled call of every block, or why there is none."""
        torch.compiler.reset()  # every mode is compiled anew: many variants of one function would end in silent eager calls
        reporter = CollectingReporter()
        batch = self._feed.take(self._position, self.setting.batch)
        trial = Trial(self.network, self.objective, batch, self.setting.batch, precision)
        with products(mode, precision):
            compiled = compile_blocks(self.network, trial, demanded=False, reporter=reporter)
        calls = [block._compiled_call_impl for block in self.network.blocks]
        for block in self.network.blocks:
            block._compiled_call_impl = None
        self.optimizers.zero_grad()
        return calls, None if compiled else "; ".join(reporter.warnings) or "not compiled"

    def rows(self, mode: str, sides: Sequence[Side], sheet: Accelerator | None) -> list[StepRow]:
        """All sides of one mode, in turn."""
        setting, precision = self.setting, precision_of(mode, self.device)
        if not has(mode, self.device):
            return [StepRow(mode, PLAIN, failed="this device has no such units")]
        scaler = precision.scaler()
        calls: list[Call | None] = [None for _ in self.network.blocks]
        without: dict[str, str] = {}
        if any(side.compiled for side in sides):
            calls, problem = self.compiled_calls(mode, precision)
            without = {side.name: problem for side in sides if problem is not None and side.compiled}
        losses: dict[str, torch.Tensor] = {}

        def work(side: Side) -> Callable[[], object]:
            def step() -> None:
                with self.on(side, calls):
                    losses[side.name] = self.step(mode, side, precision, scaler)

            return step

        runs = {side.name: work(side) for side in sides if side.name not in without}
        times, peaks, failed = in_turn(runs, rounds=setting.rounds, steps=setting.steps, warm_up=4, device=self.device)
        self.optimizers.zero_grad()
        failed = {**without, **failed}
        failed.update({name: f"the loss is {float(loss)}" for name, loss in losses.items() if not math.isfinite(float(loss))})
        known = sheet.flops.get(mode) if sheet is not None else None
        peak = measured_peak(mode, setting.peak_width, self.device)
        return [self._row(mode, side.name, times, peaks, failed, known, peak) for side in sides]

    def _row(
        self,
        mode: str,
        name: str,
        times: dict[str, float],
        peaks: dict[str, int],
        failed: dict[str, str],
        sheet: float | None,
        measured: float,
    ) -> StepRow:
        if name in failed:
            return StepRow(mode, name, failed=failed[name])
        setting, seconds = self.setting, times[name]
        tokens = setting.batch * setting.model.context_length / seconds
        flops = tokens * flops_per_token(setting.model, setting.vocab_size)
        return StepRow(
            mode,
            name,
            milliseconds=1e3 * seconds,
            tokens_per_second=tokens,
            mfu_sheet=flops / sheet if sheet is not None else None,
            mfu_measured=flops / measured,
            peak_bytes=peaks.get(name),
            speed_of_plain=times[PLAIN] / seconds if PLAIN not in failed else None,
            memory_of_plain=peaks[name] / peaks[PLAIN] if name in peaks and PLAIN in peaks else None,
        )


def against_fp32(rows: list[StepRow]) -> None:
    """Fill in how many times as fast every row is as the same side in fp32."""
    plain = {row.side: row.milliseconds for row in rows if row.mode == "fp32"}
    for row in rows:
        before = plain.get(row.side)
        if before is not None and row.milliseconds is not None:
            row.speed_of_fp32 = before / row.milliseconds


def training_rows(setting: Setting, device: torch.device, sheet: Accelerator | None, sides: Sequence[Side]) -> list[StepRow]:
    context = setting.model.context_length
    tokens = np.random.default_rng(0).integers(setting.vocab_size, size=4 * setting.batch * context + 1)
    rows: list[StepRow] = []
    with Feed(Batches(tokens, context, 0), CausalObjective(), pin=device.type == "cuda") as feed:
        training = Training(setting, device, feed)
        for mode in MODES:
            say(f"training in {mode} ...")
            rows += training.rows(mode, sides, sheet)
    torch.compiler.reset()
    against_fp32(rows)
    return rows


def optimizer_rows(setting: Setting, device: torch.device) -> list[OptimizerRow]:
    """One step of each optimiser on the same weights and gradients, in turn."""
    network = Transformer(setting.model, setting.vocab_size, seed=0).to(device)
    for parameter in network.parameters():
        parameter.grad = 1e-3 * torch.randn_like(parameter)
    sections: dict[str, Optimizer] = {
        "adamw": AdamWOptimizer(name="adamw", lr=1e-6),
        "muon": MuonOptimizer(name="muon", lr=1e-6, adamw_lr=1e-6),
    }
    built = {name: groups.build(section, network, network.stacked_matrices()) for name, section in sections.items()}
    runs: dict[str, Callable[[], object]] = {name: optimizers.step for name, optimizers in built.items()}
    times, _, failed = in_turn(runs, rounds=setting.rounds, steps=4 * setting.steps, warm_up=3, device=device)
    rows = []
    for name, optimizers in built.items():
        if name in failed:
            rows.append(OptimizerRow(name, failed=failed[name]))
            continue
        held = sum(value.numel() * value.element_size() for value in optimizers.state().values())
        ratio = times[name] / times["adamw"] if "adamw" in times else None
        rows.append(OptimizerRow(name, 1e3 * times[name], held, ratio))
    return rows


class _Mute:
    """Stands where the engine wants a tokenizer: begins anywhere, never ends, writes nothing."""

    end_of_text = None

    def encode(self, text: str) -> list[int]:
        return [0]

    def stream_decoder(self) -> _Mute:
        return self

    def push(self, id: int) -> str:
        return ""

    def finish(self) -> str:
        return ""


class DecodeStep:
    """The model's part of decoding one token, again and again at the middle of the context: no sampling, the likeliest token."""

    def __init__(self, network: Transformer, batch: int) -> None:
        self._decoder = Decoder(network)
        self._at = network.model.context_length // 2
        self._positions = torch.full((batch,), self._at, device=self._decoder.device)
        self._cache = self._decoder.cache(batch)
        self.tokens = torch.zeros(batch, dtype=torch.long, device=self._decoder.device)

    def __call__(self) -> None:
        self.logits = self._decoder.advance(
            self._cache.layers, self._cache.tokens, self.tokens, self._positions, self._at + 1, even=True
        )
        self.tokens.copy_(self.logits.argmax(dim=-1))

    def recorded(self) -> Callable[[], None]:
        """The same step as a CUDA graph. Raises `RuntimeError` when it cannot be recorded or does not repeat what it should."""
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # kernels are chosen and libraries loaded before the recording
            for _ in range(3):
                self()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self()
        written = self.logits  # where every replay writes
        self.tokens.zero_()
        self()
        self.tokens.zero_()
        graph.replay()
        difference = (written - self.logits).float().norm() / self.logits.float().norm()
        if not difference < 0.01:
            raise RuntimeError(f"the graph's logits are not the eager step's: relative difference {float(difference):.1e}")
        return lambda: graph.replay()


def decode_rows(setting: Setting, device: torch.device) -> list[DecodeRow]:
    network = Transformer(setting.model, setting.vocab_size, seed=0).to(device).eval()
    rows: list[DecodeRow] = []
    for weights in ("fp32", "bf16"):
        if not has(weights, device):
            continue
        network.to(DTYPES[weights])
        for batch in (1, 8):
            say(f"decoding with {weights} weights, batch {batch} ...")
            rows += _decode_rows(setting, network, weights, batch, device)
    return rows


@torch.inference_mode()
def _decode_rows(setting: Setting, network: Transformer, weights: str, batch: int, device: torch.device) -> list[DecodeRow]:
    mute = cast(Tokenizer, _Mute())
    options = SamplingOptions(max_new_tokens=min(setting.new_tokens, setting.model.context_length - 1))
    failed: dict[str, str] = {}
    step = DecodeStep(network, batch)
    sides: dict[str, Callable[[], object]] = {"one step, eager": step}
    if device.type == "cuda":
        try:
            sides["one step, CUDA graph"] = step.recorded()
        except RuntimeError as error:  # recording refuses in many ways
            failed["one step, CUDA graph"] = "not yet: " + str(error).splitlines()[0]
    else:
        failed["one step, CUDA graph"] = "needs CUDA"
    repeat = 4 * setting.new_tokens // 10 + 1
    times, _, ran_out = in_turn(sides, rounds=setting.rounds, steps=repeat, warm_up=3, device=device)
    engine: dict[str, Callable[[], object]] = {"engine": lambda: generate(network, mute, "", options, count=batch)}
    whole, _, engine_failed = in_turn(engine, rounds=min(3, setting.rounds), steps=1, warm_up=1, device=device)
    speeds = {name: batch / seconds for name, seconds in times.items()}
    speeds.update({name: batch * options.max_new_tokens / seconds for name, seconds in whole.items()})
    failed = {**failed, **ran_out, **engine_failed}
    eager = speeds.get("one step, eager")
    rows = [
        DecodeRow(
            weights, batch, name, speeds.get(name), speeds[name] / eager if name in speeds and eager else None, failed.get(name)
        )
        for name in ("engine", "one step, eager", "one step, CUDA graph")
    ]
    return [*rows, DecodeRow(weights, batch, "engine, CUDA graph", failed=ONE_GRAPH)]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def table(title: str, head: Sequence[str], rows: Sequence[tuple[Sequence[str], str | None]]) -> str:
    """Columns as wide as they need; a row that failed says why after its first cells."""
    widths = [
        max(len(head[column]), *(len(cells[column]) for cells, _ in rows if column < len(cells))) for column in range(len(head))
    ]
    lines = [title, "  ".join(name.ljust(width) for name, width in zip(head, widths, strict=True))]
    for cells, failed in rows:
        line = "  ".join(text.ljust(width) for text, width in zip(cells, widths, strict=False))
        lines.append(line if failed is None else f"{line}  {failed}")
    return "\n".join(line.rstrip() for line in lines) + "\n"


def step_table(rows: Sequence[StepRow]) -> str:
    head = ("numbers", "step", "ms", "tokens/s", "MFU sheet", "MFU peak", "MiB", "speed", "memory", "of fp32")
    lines = []
    for row in rows:
        cells = [row.mode, row.side]
        if row.failed is None:
            cells += [cell(row.milliseconds, ".2f"), cell(row.tokens_per_second, ",.0f")]
            cells += [cell(row.mfu_sheet, ".1%"), cell(row.mfu_measured, ".1%")]
            cells += [cell(None if row.peak_bytes is None else row.peak_bytes / 2**20, ",.0f")]
            cells += [cell(row.speed_of_plain, ".2f"), cell(row.memory_of_plain, ".2f"), cell(row.speed_of_fp32, ".2f")]
        lines.append((cells, row.failed))
    return table("Training. speed and memory: against the plain step of the same numbers", head, lines)


def optimizer_table(rows: Sequence[OptimizerRow]) -> str:
    lines = []
    for row in rows:
        state = None if row.state_bytes is None else row.state_bytes / 2**20
        cells = [row.name, cell(row.milliseconds, ".2f"), cell(state, ",.0f"), cell(row.time_of_adamw, ".2f")]
        lines.append((cells if row.failed is None else cells[:1], row.failed))
    return table("Optimisers, one step", ("optimiser", "ms", "state MiB", "time of AdamW"), lines)


def decode_table(rows: Sequence[DecodeRow]) -> str:
    lines = []
    for row in rows:
        cells = [row.weights, str(row.batch), row.what]
        numbers = [cell(row.tokens_per_second, ",.0f"), cell(row.ratio, ".2f")]
        lines.append((cells + numbers if row.failed is None else cells, row.failed))
    return table("Decoding", ("weights", "batch", "what", "tokens/s", "of the eager step"), lines)


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("gpt2-124m", "small"), default="gpt2-124m")
    parser.add_argument("--batch", type=int, help="sequences per optimiser step, a multiple of 4 (16 for gpt2-124m, 64 for small)")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 or cpu")
    parser.add_argument("--tiny", action="store_true", help="a model of no use: shows in seconds that everything runs")
    parser.add_argument("--no-compile", action="store_true", help="leave out the compiled rows")
    parser.add_argument("--hardware", help="name of the data sheet in tinylm.cost.accelerators, where the GPU is not recognised")
    parts = ("training", "optimizers", "decoding")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout instead of tables")
    asked = parser.parse_args(given)
    if asked.batch is not None and (asked.batch < 4 or asked.batch % 4):
        parser.error("--batch must be a multiple of 4: it is also cut into 4 micro-batches")
    if torch.device(asked.device).type not in ("cuda", "cpu"):
        parser.error("--device must be cuda or cpu")
    return asked


def main(given: Sequence[str] | None = None) -> None:
    asked = arguments(given)
    device = torch.device(asked.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no CUDA GPU that torch can use here; --device cpu --tiny only shows that the script runs")
    if device.type == "cpu" and asked.tiny:
        torch.set_num_threads(1)  # threads that wait for one another would be all of it
    if device.type == "cuda":
        device = torch.device("cuda", device.index if device.index is not None else torch.cuda.current_device())
        torch.cuda.set_device(device)
    try:
        sheet = sheet_of(device, asked.hardware)
    except InputError as error:
        sys.exit(str(error))
    chosen = setting(asked.model, tiny=asked.tiny, batch=asked.batch)
    sides = [side for side in SIDES if not (side.compiled and asked.no_compile)]
    what = {
        "device": describe(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "sheet": sheet.name if sheet is not None else None,
        "model": asked.model,
        "tiny": asked.tiny,
        "vocab_size": chosen.vocab_size,
        "batch": chosen.batch,
        "tokens_per_step": chosen.batch * chosen.model.context_length,
    }
    results: dict[str, list[Any]] = {}
    measures: dict[str, tuple[Callable[[], list[Any]], Callable[[Any], str]]] = {
        "training": (lambda: training_rows(chosen, device, sheet, sides), step_table),
        "optimizers": (lambda: optimizer_rows(chosen, device), optimizer_table),
        "decoding": (lambda: decode_rows(chosen, device), decode_table),
    }
    if not asked.json:
        known = f"data sheet {sheet.name}" if sheet is not None else "no data sheet known (--hardware NAME)"
        print(f"{what['device']}, torch {torch.__version__}, {known}")
        print(f"{asked.model}{', tiny' if asked.tiny else ''}: {what['tokens_per_step']:,} tokens a step\n", flush=True)
    for part in asked.parts:
        measure, shown = measures[part]
        results[part] = measure()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if not asked.json:
            print(shown(results[part]), flush=True)
    if asked.json:
        print(json.dumps({**what, **{part: [asdict(row) for row in rows] for part, rows in results.items()}}, indent=1))


if __name__ == "__main__":
    main()
