"""Export models to ONNX files that map ids `(batch, time)` to logits, without a KV cache.

The output `logits` is `(batch, time, vocabulary)`, or `(batch, labels)` for a classifier. For an encoder without a head, the output
is `last_hidden_state` `(batch, time, width)` instead. Encoders and classifiers have a second input, `attention_mask`
`(batch, time)`: 1 for text and 0 for the padding after it.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from tinylm.interchange import verify
from tinylm.model.base import Model
from tinylm.model.classifier import SequenceClassifier
from tinylm.recipe.schema import ModelVariant
from tinylm.recipe.support import ANY, COMMON, Supports, check_supported
from tinylm.tokenizer import Tokenizer

SUPPORTS: Supports = {**COMMON, "rope_scaling": ANY, "rope_fraction": ANY, "shifted_key_heads": ANY}
"""The values of `model:` keys for which torch can export a graph with dynamic batch size and sequence length."""
ENCODERS: Supports = {
    **SUPPORTS,
    "architecture": ("encoder",),
    "shifted_key_heads": (0,),
    **dict.fromkeys(("token_types", "head_transform", "head_bias", "norm_first_block"), ANY),
    **dict.fromkeys(("attention_window", "attention_pattern", "rope_theta_local"), ANY),
    "feed_forward": ("gelu", "gelu_exact", "relu", "relu2", "swiglu", "geglu", "geglu_exact"),
}
"""The supported values for encoders."""
_EXTRA_SHAPES = ((1, 1), (3, 5))
"""Shapes `(batch, time)` that `check_export` tests in addition to real text, because the graph must accept any shape."""


class _Graph(nn.Module):
    """The exported graph, which maps ids and, for encoders and classifiers, an attention mask to logits or hidden states."""

    def __init__(self, network: Model, has_head: bool) -> None:
        super().__init__()
        self.network = network
        self.has_head = has_head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        segments = None if attention_mask is None else attention_mask - 1
        output: Tensor = (self.network if self.has_head else self.network.hidden)(input_ids, segments=segments)
        return output


def _takes_mask(network: Model) -> bool:
    return isinstance(network, SequenceClassifier) or not network.is_causal


def check_possible(model: ModelVariant) -> None:
    """Raise `InputError` if the model is not supported or a required package is missing."""
    check_supported(model, ENCODERS if model.bidirectional else SUPPORTS, "ONNX export", "--to onnx")
    for module in ("onnx", "onnxscript", "onnxruntime"):
        verify.require(module, "onnx", "writing ONNX")


def write(path: Path, network: Model, name: str, *, has_head: bool = True) -> None:
    """Export the network with dynamic batch size and sequence length, up to the context length. The metadata includes `name`.

    If `has_head` is false, the graph returns the hidden states.
    """
    check_possible(network.model)
    import onnx

    context = network.model.context_length
    dynamic = {0: torch.export.Dim("batch")} | ({1: torch.export.Dim("time", max=context)} if context > 1 else {})
    # Attention masks by window only if a text is longer than the window, so the example must be longer.
    length = min(max(2, 1 + (getattr(network.model, "attention_window", None) or 0)), context)
    example = torch.zeros((2, length), dtype=torch.long)
    inputs = {"input_ids": example} | ({"attention_mask": torch.ones_like(example)} if _takes_mask(network) else {})
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            _Graph(network, has_head).eval(),
            tuple(inputs.values()),
            dynamo=True,
            verbose=False,
            input_names=list(inputs),
            output_names=["logits" if has_head else "last_hidden_state"],
            dynamic_shapes=dict.fromkeys(inputs, dynamic),
        )
    assert program is not None
    proto = program.model_proto
    for key, value in {"name": name, "context_length": context, "vocab_size": network.vocab_size}.items():
        proto.metadata_props.add(key=key, value=str(value))
    onnx.save(proto, str(path))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the messages and warnings of torch's exporter."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def check_export(path: Path, network: Model, tokenizer: Tokenizer, text: str, *, has_head: bool = True) -> tuple[float, int]:
    """Compare the exported graph, run with onnxruntime, with the network on `text` and on other shapes.

    Returns the largest absolute difference between outputs and the number of compared text tokens. Raises `WorkError` if the
    difference is too large.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    graph = _Graph(network, has_head)

    def difference(ids: Tensor, mask: Tensor | None) -> float:
        inputs = {"input_ids": ids} | ({} if mask is None else {"attention_mask": mask})
        output = torch.from_numpy(session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0])
        with torch.no_grad():
            differences = (graph(ids, mask) - output).abs()
        if mask is not None and differences.dim() == 3:  # the outputs for padding have no meaning
            differences = differences[mask > 0]
        return float(differences.max())

    context = network.model.context_length
    rows = verify.windows([tokenizer.end_of_text or 0, *tokenizer.encode(text)], context)
    batches = [rows, *(torch.arange(b * t).view(b, t) % network.vocab_size for b, t in _EXTRA_SHAPES if t <= context)]
    cases: list[tuple[Tensor, Tensor | None]] = [(ids, None) for ids in batches]
    if _takes_mask(network):
        half = (torch.arange(rows.shape[1]) <= rows.shape[1] // 2).long().expand_as(rows).contiguous()
        cases = [(rows, half), *((ids, torch.ones_like(ids)) for ids in batches)]
    largest = 0.0
    for ids, mask in cases:
        found = difference(ids, mask)
        verify.check_logits(found, "the ONNX file")
        largest = max(largest, found)
    return largest, rows.numel()
