"""Tiny translation models and sentence pairs for tests."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

from tinylm.model import registry
from tinylm.model.encoder_decoder import EncoderDecoder
from tinylm.model.recurrent_encoder_decoder import RecurrentEncoderDecoder
from tinylm.model.sequence_to_sequence import SequenceToSequence
from tinylm.recipe.encoder_decoder import EncoderDecoderSection
from tinylm.recipe.recurrent import RecurrentEncoderDecoderSection

VOCAB_SIZE = 40
END = 0

REVERSE = """\
name: reverse
seed: 3
data: {{format: pairs, train: {pairs}, heldout: {{share: 0.1}}}}
tokenizer: {{kind: word, split: whitespace, vocab_size: 32}}
model:
  {{architecture: encoder_decoder, preset: {preset}, n_layer: 1, n_head: 2, n_embd: 32, context_length: 12, dropout: 0.0}}
training:
  {{steps: {steps}, global_batch_size: 16, micro_batch_size: 8, precision: fp32, compile: off, log_every: 1,
  optimizer: {{name: adamw, lr: 0.01}}}}
objective: {{name: translation, label_smoothing: 0.1}}
evaluation: {{every: 10}}
checkpoint: {{every: 4, keep: 3}}
"""


def section(preset: str = "transformer", **overrides: Any) -> EncoderDecoderSection:
    """Return a model section with 2 encoder and 3 decoder blocks of width 32."""
    shape = {"n_layer": 2, "n_decoder_layer": 3, "n_head": 4, "n_embd": 32, "context_length": 24}
    return EncoderDecoderSection.model_validate({"preset": preset, **shape, **overrides})


def network(preset: str = "transformer", *, vocab_size: int = VOCAB_SIZE, seed: int = 0, **overrides: Any) -> EncoderDecoder:
    """Return a network in eval mode with noise added to its initial weights."""
    built = registry.build(section(preset, **overrides), vocab_size, seed)
    assert isinstance(built, EncoderDecoder)
    _add_noise(built, seed)
    return built.eval()


def recurrent_network(
    preset: str = "bahdanau", *, vocab_size: int = VOCAB_SIZE, seed: int = 0, **overrides: Any
) -> RecurrentEncoderDecoder:
    """Return a recurrent network of width 32 in eval mode with noise added to its initial weights."""
    shape = {"n_embd": 32, "context_length": 24}
    built = registry.build(
        RecurrentEncoderDecoderSection.model_validate({"preset": preset, **shape, **overrides}), vocab_size, seed
    )
    assert isinstance(built, RecurrentEncoderDecoder)
    _add_noise(built, seed)
    return built.eval()


def translators(*, vocab_size: int = VOCAB_SIZE, seed: int = 0) -> dict[str, SequenceToSequence]:
    """Return a small network of each kind, by preset."""
    sizes = {"vocab_size": vocab_size, "seed": seed}
    networks: dict[str, SequenceToSequence] = {preset: network(preset, **sizes) for preset in ("transformer", "modern")}
    return {**networks, **{preset: recurrent_network(preset, **sizes) for preset in ("bahdanau", "sutskever")}}


def _add_noise(network: SequenceToSequence, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)


def reversed_pairs(count: int, *, seed: int = 0, letters: str = "abcdef", longest: int = 6) -> list[dict[str, str]]:
    """Return pairs in which the source is random letters and the target is the same letters in reverse order."""
    generator = random.Random(seed)
    sequences = [generator.choices(letters, k=generator.randint(3, longest)) for _ in range(count)]
    return [{"source": " ".join(sequence), "target": " ".join(reversed(sequence))} for sequence in sequences]


def write_jsonl(path: Path, records: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path
