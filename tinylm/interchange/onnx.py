"""ONNX files: ids (batch, time) to logits (batch, time, vocabulary), of every kind of model, without a key/value cache."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from tinylm.interchange import verify
from tinylm.model.transformer import Transformer
from tinylm.tokenizer import Tokenizer

_SHAPES = ((1, 1), (3, 5))
"""Batches and lengths that are tried beside real text: the file must take any."""


class _Logits(nn.Module):
    """The one way through the network that the file holds."""

    def __init__(self, network: Transformer) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.network(input_ids)
        return logits


def require() -> None:
    """Raises `InputError` without the packages that exporting and checking need."""
    for module in ("onnx", "onnxscript", "onnxruntime"):
        verify.require(module, "onnx", "writing ONNX")


def write(path: Path, network: Transformer, name: str) -> None:
    """Write `path` with torch's exporter; batch and time are free, time up to the context."""
    require()
    import onnx

    context = network.model.context_length
    free = {0: torch.export.Dim("batch")} | ({1: torch.export.Dim("time", max=context)} if context > 1 else {})
    example = torch.zeros((2, min(2, context)), dtype=torch.long)
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            _Logits(network).eval(),
            (example,),
            dynamo=True,
            verbose=False,
            input_names=["input_ids"],
            output_names=["logits"],
            dynamic_shapes={"input_ids": free},
        )
    assert program is not None
    proto = program.model_proto
    for key, value in {"name": name, "context_length": context, "vocab_size": network.vocab_size}.items():
        proto.metadata_props.add(key=key, value=str(value))
    onnx.save(proto, str(path))


@contextlib.contextmanager
def _quiet():  # type: ignore[no-untyped-def]
    """torch's exporter without its progress and advice."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def check_export(path: Path, network: Transformer, tokenizer: Tokenizer, text: str) -> tuple[float, int]:
    """Load the file with onnxruntime: (largest difference of logits on `text`, tokens compared).

    Raises `WorkError` when it is not the same model.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def theirs(ids: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"input_ids": ids.numpy()})[0])

    context = network.model.context_length
    rows = verify.windows([tokenizer.end_of_text or 0, *tokenizer.encode(text)], context)
    tried = [rows, *(torch.arange(b * t).view(b, t) % network.vocab_size for b, t in _SHAPES if t <= context)]
    largest = 0.0
    for ids in tried:
        with torch.no_grad():
            difference = float((network(ids) - theirs(ids)).abs().max())
        verify.check_same(difference, "the ONNX file")
        largest = max(largest, difference)
    return largest, rows.numel()
