"""Measure training and decoding speed on one GPU. Compare precisions and ways of executing a step with plain eager execution.

    python benchmarks/gpu.py [--model gpt2-124m|small] [--batch N] [--parts PART ...] [--json]

Runs of the variants are interleaved. They use random tokens, because the speed does not depend on the text. All training variants
share one network and one optimizer, so the peak memory of a variant does not include that of others. A variant that runs out of
memory is marked as failed, and the others continue. `--device cpu --tiny` is a smoke test.
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

from tinylm.cost.accelerators import Accelerator, find, from_device_name
from tinylm.cost.memory import EVALUATION_BATCH_LOGITS, EVALUATION_BATCH_TOKENS
from tinylm.cost.parameters import flops_per_token
from tinylm.data.datasets import TokenStream
from tinylm.data.shards import Counts, Shard
from tinylm.device import describe
from tinylm.errors import InputError
from tinylm.evaluation.perplexity import BatchLimits, EvaluationOptions, evaluate
from tinylm.generation.engine import generate
from tinylm.generation.sampling import SamplingOptions
from tinylm.model.decoder import Decoder
from tinylm.model.functions import attention_without_cudnn
from tinylm.model.graphs import CUDAGraphs
from tinylm.model.transformer import Transformer
from tinylm.optim import groups
from tinylm.processes import SINGLE_PROCESS
from tinylm.recipe.schema import AdamWOptimizer, DecoderSection, MuonOptimizer, Optimizer
from tinylm.reporting import CollectingReporter
from tinylm.tokenizer import Tokenizer
from tinylm.training.compilation import Trial, compile_units
from tinylm.training.feed import Feed
from tinylm.training.objectives import CausalLM
from tinylm.training.out_of_memory import is_out_of_memory
from tinylm.training.precision import Precision
from tinylm.training.step import GradientSettings, accumulate

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PLAIN = "plain"
UNSUPPORTED = "not supported by this device"
ENGINE_GRAPHS = "engine, CUDA graphs"
CompiledCall = Callable[..., Any]
"""The compiled forward call of a block, which torch keeps in `Module._compiled_call_impl`."""


@dataclass(frozen=True)
class BenchmarkSettings:
    """The model, the batch and the number of repetitions."""

    model: DecoderSection
    vocab_size: int
    batch: int
    """Sequences per optimizer step."""
    rounds: int
    steps: int
    """Steps per time measurement."""
    peak_width: int
    """Width of the square matrices that are multiplied to measure the peak FLOP/s."""
    new_tokens: int
    decode_batches: tuple[int, ...] = (1, 16, 64)
    """Batch sizes for decoding."""


def make_settings(name: str, *, tiny: bool, batch: int | None) -> BenchmarkSettings:
    if tiny:
        preset = "gpt2" if name == "gpt2-124m" else "modern"
        shape = {"preset": preset, "n_layer": 2, "n_head": 2, "n_embd": 32, "context_length": 32}
        return BenchmarkSettings(
            DecoderSection.model_validate(shape),
            128,
            batch or 4,
            rounds=2,
            steps=1,
            peak_width=64,
            new_tokens=8,
            decode_batches=(1, 8),
        )
    if name == "gpt2-124m":
        shape = {"preset": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768, "context_length": 1024}
        return BenchmarkSettings(
            DecoderSection.model_validate(shape), 50_304, batch or 16, rounds=5, steps=4, peak_width=8192, new_tokens=256
        )
    return BenchmarkSettings(DecoderSection(), 4096, batch or 64, rounds=7, steps=10, peak_width=8192, new_tokens=200)  # type: ignore[call-arg]


@dataclass(frozen=True)
class Variant:
    """One way to execute the same training step."""

    name: str
    compiled: bool = False
    recompute: bool = False
    """Activation checkpointing."""
    n_micro_batches: int = 1
    compiled_together: bool = False
    """Whether all blocks are compiled as one graph. Training compiles each block on its own."""
    fused_loss: bool = True
    """Whether the loss is compiled if the vocabulary is large, as in training."""


VARIANTS = (
    Variant(PLAIN),
    Variant("compiled", compiled=True),
    Variant("compiled together", compiled_together=True),
    Variant("compiled, plain loss", compiled=True, fused_loss=False),
    Variant("checkpointing", recompute=True),
    Variant("compiled, checkpointing", compiled=True, recompute=True),
    Variant("4 micro-batches", n_micro_batches=4),
    Variant("compiled, 4 micro-batches", compiled=True, n_micro_batches=4),
)


@dataclass
class StepRow:
    """One variant in one precision. The time of an optimizer step is the median over the rounds.

    The field names are JSON keys. `mode` is the precision. `mfu_sheet` is the MFU relative to the peak FLOP/s in the data sheet.
    `mfu_measured` is relative to the measured throughput of a large matmul.
    """

    mode: str
    variant: str
    milliseconds: float | None = None
    tokens_per_second: float | None = None
    mfu_sheet: float | None = None
    mfu_measured: float | None = None
    peak_bytes: int | None = None
    speedup_over_plain: float | None = None
    """Speedup over the plain variant in the same precision."""
    memory_ratio_to_plain: float | None = None
    """Peak memory relative to the plain variant in the same precision."""
    speedup_over_fp32: float | None = None
    """Speedup over the same variant in fp32."""
    failed: str | None = None


@dataclass
class OptimizerRow:
    name: str
    milliseconds: float | None = None
    state_bytes: int | None = None
    time_ratio_to_adamw: float | None = None
    """Time relative to AdamW."""
    failed: str | None = None


@dataclass
class DecodeRow:
    """Total throughput of all sequences. `ratio` is the speedup over the eager step with the same batch size and weight precision,
    which is the value of `weights`."""

    weights: str
    batch: int
    method: str
    tokens_per_second: float | None = None
    ratio: float | None = None
    first_seconds: float | None = None
    """Time of the first generation, which captures graphs and loads libraries."""
    failed: str | None = None


@dataclass
class EvaluationRow:
    """An evaluation on random tokens. `mode` is the precision, and `loss` is in nats per token."""

    name: str
    mode: str
    batch_tokens: int
    tokens_per_second: float | None = None
    loss: float | None = None
    failed: str | None = None


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_per_call(work: Callable[[], object], repeat: int, device: torch.device) -> float:
    """Return the mean seconds per call over `repeat` calls. Synchronize only before the first call and after the last."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeat):
        work()
    synchronize(device)
    return (time.perf_counter() - start) / repeat


def run_catching_out_of_memory(work: Callable[[], None]) -> str | None:
    """Call `work`. If it runs out of memory, free its memory and return an error message."""
    failed = None
    try:
        work()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        failed = "out of memory"
    if failed is not None:  # outside the handler, because the exception keeps the frames and their tensors alive
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return failed


def measure_alternately(
    variants: dict[str, Callable[[], object]], *, rounds: int, steps: int, warmup: int, device: torch.device
) -> tuple[dict[str, float], dict[str, int], dict[str, str]]:
    """Warm up every variant, then run each once per round. Return median seconds, peak bytes, and errors by variant name."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    peaks: dict[str, int] = {}
    failed: dict[str, str] = {}
    for round_index in range(-1, rounds):
        for name, work in variants.items():
            if name in failed:
                continue
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)

            def measure(name: str = name, work: Callable[[], object] = work, is_warmup: bool = round_index < 0) -> None:
                seconds = seconds_per_call(work, warmup if is_warmup else steps, device)
                if not is_warmup:
                    times[name].append(seconds)

            problem = run_catching_out_of_memory(measure)
            if problem is not None:
                failed[name] = problem
            elif device.type == "cuda" and round_index >= 0:  # the first calls may compile and autotune kernels
                peaks[name] = max(peaks.get(name, 0), torch.cuda.max_memory_allocated(device))
    medians = {name: statistics.median(seconds) for name, seconds in times.items() if seconds and name not in failed}
    return medians, peaks, failed


def is_supported(precision_name: str, device: torch.device) -> bool:
    """Return whether the device supports a precision in hardware.

    A CPU counts as supporting every precision, so that smoke tests can run.
    """
    if device.type != "cuda" or precision_name in ("fp32", "fp16"):
        return True
    if precision_name == "tf32":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def to_precision(precision_name: str, device: torch.device) -> Precision:
    return Precision("fp32" if precision_name == "tf32" else precision_name, device)


def matmul_precision(precision_name: str, precision: Precision) -> AbstractContextManager[None]:
    """Return a context with the trainer's matmul precision. "fp32" keeps TF32 disabled, although the trainer enables it."""
    return nullcontext() if precision_name == "fp32" else precision.tf32()


def measured_peak(precision_name: str, width: int, device: torch.device) -> float:
    """Return the highest FLOP/s of several matmuls of large random matrices. (A GPU multiplies constant matrices faster.)"""
    a, b = (torch.randn(width, width, device=device).to(DTYPES[precision_name]) for _ in range(2))
    with matmul_precision(precision_name, to_precision(precision_name, device)):
        seconds_per_call(lambda: a @ b, 3, device)
        best = min(seconds_per_call(lambda: a @ b, 3, device) for _ in range(5))
    return 2 * width**3 / best


def find_data_sheet(device: torch.device, hardware: str | None) -> Accelerator | None:
    """Return the data sheet for `hardware`, or for the device if `hardware` is None. Raises `InputError` for an unknown name."""
    if hardware is not None:
        return find(hardware)
    if device.type != "cuda":
        return None
    return from_device_name(describe(device))


class Training:
    """A network with its optimizer and batches. It runs the trainer's step in any precision and variant."""

    def __init__(self, settings: BenchmarkSettings, device: torch.device, feed: Feed) -> None:
        self.settings = settings
        self.device = device
        self.objective = CausalLM()
        self.network = Transformer(settings.model, settings.vocab_size, seed=0).to(device)
        self.optimizers = groups.build(AdamWOptimizer(name="adamw", lr=1e-5), self.network)
        self._compiled_hidden: CompiledCall | None = None
        self._feed = feed
        self._position = 0

    def step(self, precision_name: str, variant: Variant, precision: Precision, scaler: torch.amp.GradScaler) -> torch.Tensor:
        """Take a training step and return the mean loss, without synchronization."""
        size = self.settings.batch
        batch = self._feed.batch(self._position, size)
        self._position += size
        self.optimizers.zero_grad()
        gradient_settings = GradientSettings(size // variant.n_micro_batches, precision, self.objective, scaler)
        with matmul_precision(precision_name, precision):
            loss = accumulate(self.network, batch, gradient_settings)
        scaler.unscale_(self.optimizers)  # type: ignore[arg-type]  # the scaler only needs param_groups and step
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizers.step(torch.stack((loss, norm)).isfinite().all())
        scaler.update()
        return loss

    @contextmanager
    def configured(self, variant: Variant, compiled: Sequence[CompiledCall | None]) -> Iterator[None]:
        """Configure the network for a variant. `compiled` contains one compiled call per block, for compiled variants."""
        self.network.recompute = variant.recompute
        self.network.compile_loss = variant.fused_loss
        for block, call in zip(self.network.blocks, compiled, strict=True):
            block._compiled_call_impl = call if variant.compiled else None
        if variant.compiled_together:
            if self._compiled_hidden is None:
                self._compiled_hidden = torch.compile(self.network.hidden, dynamic=False)
            self.network.hidden = self._compiled_hidden  # type: ignore[method-assign]
        try:
            yield
        finally:
            self.network.recompute = False
            self.network.__dict__.pop("hidden", None)

    def compile(self, precision_name: str, precision: Precision) -> tuple[list[CompiledCall | None], str | None]:
        """Return one compiled call per block, and an error message if compilation failed."""
        torch.compiler.reset()  # compile each precision from scratch: after too many recompilations, torch falls back to eager
        reporter = CollectingReporter()
        batch = self._feed.batch(self._position, self.settings.batch)
        trial = Trial(self.network, batch, GradientSettings(self.settings.batch, precision, self.objective))
        with matmul_precision(precision_name, precision):
            compiled = compile_units(self.network, trial, required=False, reporter=reporter)
        calls = [block._compiled_call_impl for block in self.network.blocks]
        for block in self.network.blocks:
            block._compiled_call_impl = None
        self.optimizers.zero_grad()
        return calls, None if compiled else "; ".join(reporter.warnings) or "not compiled"

    def rows(self, precision_name: str, variants: Sequence[Variant], sheet: Accelerator | None) -> list[StepRow]:
        """Measure all variants in one precision."""
        settings, precision = self.settings, to_precision(precision_name, self.device)
        if not is_supported(precision_name, self.device):
            return [StepRow(precision_name, PLAIN, failed=UNSUPPORTED)]
        scaler = precision.scaler()
        calls: list[CompiledCall | None] = [None for _ in self.network.blocks]
        not_compiled: dict[str, str] = {}
        if any(variant.compiled for variant in variants):
            calls, problem = self.compile(precision_name, precision)
            not_compiled = {variant.name: problem for variant in variants if problem is not None and variant.compiled}
        losses: dict[str, torch.Tensor] = {}

        def make_step(variant: Variant) -> Callable[[], object]:
            def step() -> None:
                with self.configured(variant, calls):
                    losses[variant.name] = self.step(precision_name, variant, precision, scaler)

            return step

        runs = {variant.name: make_step(variant) for variant in variants if variant.name not in not_compiled}
        times, peaks, failed = measure_alternately(runs, rounds=settings.rounds, steps=settings.steps, warmup=4, device=self.device)
        self.optimizers.zero_grad()
        failed = {**not_compiled, **failed}
        failed.update({name: f"the loss is {float(loss)}" for name, loss in losses.items() if not math.isfinite(float(loss))})
        sheet_peak = sheet.flops.get(precision_name) if sheet is not None else None
        peak = measured_peak(precision_name, settings.peak_width, self.device)
        return [self._row(precision_name, variant.name, times, peaks, failed, sheet_peak, peak) for variant in variants]

    def _row(
        self,
        precision_name: str,
        name: str,
        times: dict[str, float],
        peaks: dict[str, int],
        failed: dict[str, str],
        sheet_peak: float | None,
        measured_peak: float,
    ) -> StepRow:
        if name in failed:
            return StepRow(precision_name, name, failed=failed[name])
        settings, seconds = self.settings, times[name]
        tokens = settings.batch * settings.model.context_length / seconds
        flops = tokens * flops_per_token(settings.model, settings.vocab_size)
        return StepRow(
            precision_name,
            name,
            milliseconds=1e3 * seconds,
            tokens_per_second=tokens,
            mfu_sheet=flops / sheet_peak if sheet_peak is not None else None,
            mfu_measured=flops / measured_peak,
            peak_bytes=peaks.get(name),
            speedup_over_plain=times[PLAIN] / seconds if PLAIN in times else None,
            memory_ratio_to_plain=peaks[name] / peaks[PLAIN] if name in peaks and PLAIN in peaks else None,
        )


def fill_speedup_over_fp32(rows: list[StepRow]) -> None:
    fp32 = {row.variant: row.milliseconds for row in rows if row.mode == "fp32"}
    for row in rows:
        milliseconds = fp32.get(row.variant)
        if milliseconds is not None and row.milliseconds is not None:
            row.speedup_over_fp32 = milliseconds / row.milliseconds


def training_rows(
    settings: BenchmarkSettings,
    device: torch.device,
    sheet: Accelerator | None,
    variants: Sequence[Variant],
    precision_names: Sequence[str] = PRECISIONS,
) -> list[StepRow]:
    context = settings.model.context_length
    tokens = np.random.default_rng(0).integers(settings.vocab_size, size=4 * settings.batch * context + 1)
    rows: list[StepRow] = []
    with Feed(TokenStream(tokens, context, 0), CausalLM(), seed=0, pin_memory=device.type == "cuda") as feed:
        training = Training(settings, device, feed)
        for precision_name in precision_names:
            log(f"training in {precision_name} ...")
            rows += training.rows(precision_name, variants, sheet)
    torch.compiler.reset()
    fill_speedup_over_fp32(rows)
    return rows


def optimizer_rows(settings: BenchmarkSettings, device: torch.device) -> list[OptimizerRow]:
    """Measure one step of each optimizer on the same weights and gradients."""
    network = Transformer(settings.model, settings.vocab_size, seed=0).to(device)
    for parameter in network.parameters():
        parameter.grad = 1e-3 * torch.randn_like(parameter)
    sections: dict[str, Optimizer] = {
        "adamw": AdamWOptimizer(name="adamw", lr=1e-6),
        "muon": MuonOptimizer(name="muon", lr=1e-6, adamw_lr=1e-6),
    }
    built = {name: groups.build(section, network) for name, section in sections.items()}
    runs: dict[str, Callable[[], object]] = {name: optimizers.step for name, optimizers in built.items()}
    times, _, failed = measure_alternately(runs, rounds=settings.rounds, steps=4 * settings.steps, warmup=3, device=device)
    rows = []
    for name, optimizers in built.items():
        if name in failed:
            rows.append(OptimizerRow(name, failed=failed[name]))
            continue
        state_bytes = sum(value.numel() * value.element_size() for value in optimizers.state().values())
        ratio = times[name] / times["adamw"] if "adamw" in times else None
        rows.append(OptimizerRow(name, 1e3 * times[name], state_bytes, ratio))
    return rows


class _FakeTokenizer:
    """A tokenizer that decodes all tokens to empty text. It has no end-of-text token, which would end samples early."""

    end_of_text = None

    def encode(self, text: str) -> list[int]:
        return [0]

    def space_precedes(self, prompt: str, ids: list[int]) -> bool:
        return False

    def stream_decoder(self, *, keep_first_space: bool = False) -> _FakeTokenizer:
        return self

    def push(self, id: int) -> str:
        return ""

    def finish(self) -> str:
        return ""


class DecodeStep:
    """Decodes one token greedily, without the engine, at a fixed position in the middle of the context."""

    def __init__(self, network: Transformer, batch: int) -> None:
        self._decoder = Decoder(network)
        self._position = network.model.context_length // 2
        self._positions = torch.full((batch,), self._position, device=self._decoder.device)
        self._cache = self._decoder.new_state(batch)
        self.tokens = torch.zeros(batch, dtype=torch.long, device=self._decoder.device)

    def __call__(self) -> None:
        with attention_without_cudnn(self._decoder.device):
            self.logits = self._decoder.decode_one_token(
                self._cache.layers, self._cache.tokens, self.tokens, self._positions, self._position + 1, same_length=True
            )
        self.tokens.copy_(self.logits.argmax(dim=-1))

    def capture(self) -> Callable[[], None]:
        """Capture the step as a CUDA graph. Raises `RuntimeError` if the capture fails or a replay produces different logits."""
        replay = CUDAGraphs(self._decoder.device).capture(self)
        graph_logits = self.logits  # every replay writes to this tensor
        self.tokens.zero_()
        self()
        self.tokens.zero_()
        replay()
        difference = (graph_logits - self.logits).float().norm() / self.logits.float().norm()
        if not difference < 0.01:
            raise RuntimeError(f"the graph's logits differ from the eager step's: relative difference {float(difference):.1e}")
        return replay


def decode_rows(settings: BenchmarkSettings, device: torch.device) -> list[DecodeRow]:
    network = Transformer(settings.model, settings.vocab_size, seed=0).to(device).eval()
    rows: list[DecodeRow] = []
    for weights in ("fp32", "bf16"):
        if not is_supported(weights, device):
            continue
        network.to(DTYPES[weights])
        for batch in settings.decode_batches:
            log(f"decoding with {weights} weights, batch size {batch} ...")
            rows += _decode_rows(settings, network, weights, batch, device)
    return rows


@torch.inference_mode()
def _decode_rows(
    settings: BenchmarkSettings, network: Transformer, weights: str, batch: int, device: torch.device
) -> list[DecodeRow]:
    tokenizer = cast(Tokenizer, _FakeTokenizer())
    options = SamplingOptions(max_new_tokens=min(settings.new_tokens, settings.model.context_length - 1))
    failed: dict[str, str] = {}
    step = DecodeStep(network, batch)
    variants: dict[str, Callable[[], object]] = {"one step, eager": step}
    if device.type == "cuda":
        try:
            variants["one step, CUDA graph"] = step.capture()
        except RuntimeError as error:  # some operations cannot be captured
            failed["one step, CUDA graph"] = "capture failed: " + str(error).splitlines()[0]
    else:
        failed["one step, CUDA graph"] = "requires CUDA"
    repeat = 4 * settings.new_tokens // 10 + 1
    step_times, _, step_failed = measure_alternately(variants, rounds=settings.rounds, steps=repeat, warmup=3, device=device)
    decoders = {"engine": Decoder(network)}
    if device.type == "cuda":
        decoders[ENGINE_GRAPHS] = Decoder(network, compiled=True, backend="graphs")
    else:
        failed[ENGINE_GRAPHS] = "requires CUDA"

    def make_run(decoder: Decoder) -> Callable[[], object]:
        return lambda: generate(decoder, tokenizer, "", options, count=batch)

    engine = {name: make_run(decoder) for name, decoder in decoders.items()}
    first = {name: seconds_per_call(run, 1, device) for name, run in engine.items()}
    engine_times, _, engine_failed = measure_alternately(engine, rounds=min(3, settings.rounds), steps=1, warmup=1, device=device)
    speeds = {name: batch / seconds for name, seconds in step_times.items()}
    speeds.update({name: batch * options.max_new_tokens / seconds for name, seconds in engine_times.items()})
    failed = {**failed, **step_failed, **engine_failed}
    eager = speeds.get("one step, eager")
    return [
        DecodeRow(
            weights,
            batch,
            name,
            speeds.get(name),
            speeds[name] / eager if name in speeds and eager else None,
            first.get(name),
            failed.get(name),
        )
        for name in ("engine", ENGINE_GRAPHS, "one step, eager", "one step, CUDA graph")
    ]


def evaluation_rows(settings: BenchmarkSettings, device: torch.device) -> list[EvaluationRow]:
    """Evaluate one network on random tokens.

    Use the settings used during training and those of the final evaluation, each with automatic and with small batches.
    """
    context = settings.model.context_length
    network = Transformer(settings.model, settings.vocab_size, seed=0).to(device).eval()
    tokens = np.random.default_rng(0).integers(1, settings.vocab_size, 4 * settings.batch * context + 2, dtype=np.uint16)
    tokens[[0, -1]] = 0
    shard = Shard(tokens, Counts(1, len(tokens) - 2, len(tokens) - 2, len(tokens) - 2, 0), end_of_text=0)
    lengths = np.ones(settings.vocab_size, dtype=np.int64)
    automatic = BatchLimits.of(network, settings.vocab_size, SINGLE_PROCESS)
    small = BatchLimits(min(EVALUATION_BATCH_TOKENS, max(context, EVALUATION_BATCH_LOGITS // settings.vocab_size)))
    rows = []
    for name, precision_name, limits in (
        ("final", "fp32", automatic),
        ("final, small batches", "fp32", small),
        ("during training", "bf16", automatic),
        ("during training, small batches", "bf16", small),
    ):
        row = EvaluationRow(name, precision_name, limits.tokens)

        def work(row: EvaluationRow = row, limits: BatchLimits = limits) -> None:
            with matmul_precision(row.mode, to_precision(row.mode, device)), to_precision(row.mode, device).autocast():
                options = EvaluationOptions(confidence_interval=False)
                row.loss = evaluate(network, shard, lengths, options, limits=limits).loss

        def measure(row: EvaluationRow = row, work: Callable[[], None] = work) -> None:
            work()
            row.tokens_per_second = shard.counts.tokens / seconds_per_call(work, 1, device)

        row.failed = UNSUPPORTED if not is_supported(precision_name, device) else run_catching_out_of_memory(measure)
        rows.append(row)
    return rows


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def cell(value: float | None, format_spec: str) -> str:
    return "-" if value is None else format(value, format_spec)


def table(title: str, header: Sequence[str], rows: Sequence[tuple[Sequence[str], str | None]]) -> str:
    """Format a table. Each row is (cells, error message or None). The message is printed after the last cell."""
    widths = [
        max(len(header[column]), *(len(cells[column]) for cells, _ in rows if column < len(cells))) for column in range(len(header))
    ]
    lines = [title, "  ".join(name.ljust(width) for name, width in zip(header, widths, strict=True))]
    for cells, failed in rows:
        line = "  ".join(text.ljust(width) for text, width in zip(cells, widths, strict=False))
        lines.append(line if failed is None else f"{line}  {failed}")
    return "\n".join(line.rstrip() for line in lines) + "\n"


def step_table(rows: Sequence[StepRow]) -> str:
    header = (
        "precision",
        "step",
        "ms",
        "tokens/s",
        "MFU (data sheet)",
        "MFU (matmul)",
        "peak MiB",
        "speedup",
        "memory",
        "speedup over fp32",
    )
    lines = []
    for row in rows:
        cells = [row.mode, row.variant]
        if row.failed is None:
            cells += [cell(row.milliseconds, ".2f"), cell(row.tokens_per_second, ",.0f")]
            cells += [cell(row.mfu_sheet, ".1%"), cell(row.mfu_measured, ".1%")]
            cells += [cell(None if row.peak_bytes is None else row.peak_bytes / 2**20, ",.0f")]
            cells += [
                cell(row.speedup_over_plain, ".2f"),
                cell(row.memory_ratio_to_plain, ".2f"),
                cell(row.speedup_over_fp32, ".2f"),
            ]
        lines.append((cells, row.failed))
    return table("Training (speedup and memory relative to the plain step in the same precision)", header, lines)


def optimizer_table(rows: Sequence[OptimizerRow]) -> str:
    lines = []
    for row in rows:
        state = None if row.state_bytes is None else row.state_bytes / 2**20
        cells = [row.name, cell(row.milliseconds, ".2f"), cell(state, ",.0f"), cell(row.time_ratio_to_adamw, ".2f")]
        lines.append((cells if row.failed is None else cells[:1], row.failed))
    return table("Optimizers, one step", ("optimizer", "ms", "state MiB", "time vs. AdamW"), lines)


def decode_table(rows: Sequence[DecodeRow]) -> str:
    lines = []
    for row in rows:
        cells = [row.weights, str(row.batch), row.method]
        numbers = [cell(row.tokens_per_second, ",.0f"), cell(row.ratio, ".2f"), cell(row.first_seconds, ".2f")]
        lines.append((cells + numbers if row.failed is None else cells, row.failed))
    return table("Decoding", ("weights", "batch", "method", "tokens/s", "speedup over eager step", "first call (s)"), lines)


def evaluation_table(rows: Sequence[EvaluationRow]) -> str:
    lines = []
    for row in rows:
        cells = [row.name, row.mode, f"{row.batch_tokens:,}"]
        numbers = [cell(row.tokens_per_second, ",.0f"), cell(row.loss, ".6f")]
        lines.append((cells + numbers if row.failed is None else cells, row.failed))
    return table("Evaluation", ("evaluation", "precision", "batch tokens", "tokens/s", "loss"), lines)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("gpt2-124m", "small"), default="gpt2-124m")
    parser.add_argument(
        "--batch", type=int, help="sequences per optimizer step, a multiple of 4 (default: 16 for gpt2-124m, 64 for small)"
    )
    parser.add_argument("--device", default="cuda", help="device to measure: cuda, cuda:1 or cpu")
    parser.add_argument("--tiny", action="store_true", help="smoke test with a tiny model")
    parser.add_argument("--no-compile", action="store_true", help="skip the compiled variants")
    parser.add_argument("--hardware", help="name of a data sheet in tinylm.cost.accelerators, for a GPU that is not recognized")
    parts = ("training", "optimizers", "evaluation", "decoding")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS, help="precisions in the training table")
    parser.add_argument("--variants", nargs="+", choices=[variant.name for variant in VARIANTS], help="rows of the training table")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of tables")
    options = parser.parse_args(arguments)
    if options.batch is not None and (options.batch < 4 or options.batch % 4):
        parser.error("--batch must be a multiple of 4, because one variant splits it into 4 micro-batches")
    if torch.device(options.device).type not in ("cuda", "cpu"):
        parser.error("--device must be cuda or cpu")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA GPU is available to torch; use --device cpu --tiny for a smoke test")
    if device.type == "cpu" and options.tiny:
        torch.set_num_threads(1)  # at this size, thread synchronization would dominate
    if device.type == "cuda":
        device = torch.device("cuda", device.index if device.index is not None else torch.cuda.current_device())
        torch.cuda.set_device(device)
    try:
        sheet = find_data_sheet(device, options.hardware)
    except InputError as error:
        sys.exit(str(error))
    settings = make_settings(options.model, tiny=options.tiny, batch=options.batch)
    variants = [variant for variant in VARIANTS if not ((variant.compiled or variant.compiled_together) and options.no_compile)]
    if options.variants is not None:
        variants = [variant for variant in variants if variant.name in options.variants]
    description = {
        "device": describe(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "sheet": sheet.name if sheet is not None else None,
        "model": options.model,
        "tiny": options.tiny,
        "vocab_size": settings.vocab_size,
        "batch": settings.batch,
        "tokens_per_step": settings.batch * settings.model.context_length,
    }
    results: dict[str, list[Any]] = {}
    parts: dict[str, tuple[Callable[[], list[Any]], Callable[[Any], str]]] = {
        "training": (lambda: training_rows(settings, device, sheet, variants, options.precisions), step_table),
        "optimizers": (lambda: optimizer_rows(settings, device), optimizer_table),
        "evaluation": (lambda: evaluation_rows(settings, device), evaluation_table),
        "decoding": (lambda: decode_rows(settings, device), decode_table),
    }
    if not options.json:
        sheet_text = f"data sheet {sheet.name}" if sheet is not None else "no data sheet (choose one with --hardware NAME)"
        print(f"{description['device']}, torch {torch.__version__}, {sheet_text}")
        tokens = f"{description['tokens_per_step']:,} tokens per step"
        print(f"{options.model}{', tiny' if options.tiny else ''}: {tokens}\n", flush=True)
    for part in options.parts:
        measure, format_table = parts[part]
        results[part] = measure()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if not options.json:
            print(format_table(results[part]), flush=True)
    if options.json:
        print(json.dumps({**description, **{part: [asdict(row) for row in rows] for part, rows in results.items()}}, indent=1))


if __name__ == "__main__":
    main()
