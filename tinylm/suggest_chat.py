"""Suggest a recipe that fine-tunes a run on conversations, as `tinylm new --chat` does. This module does not import torch."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from tinylm.data.chat import fitting_lengths, pack, read_parts
from tinylm.errors import InputError
from tinylm.recipe import Recipe, loads
from tinylm.recipe.chat import ChatSection
from tinylm.recipe.schema import DataSection, DecoderSection, HeldoutShare, MuonOptimizer
from tinylm.reporting import SILENT, Reporter
from tinylm.run import Run
from tinylm.tokenizer.chat_template import ChatEncoder, ChatTemplate, add_control_tokens

BATCH_SIZE, MIN_STEPS_PER_EPOCH = 8, 5
EPOCHS = ((500, 10), (5000, 5))
"""(maximum number of conversations, epochs). With more conversations, training takes 3 epochs."""
MIX_SHARE = 0.2
MAX_MUON_LR, MAX_ADAMW_LR = 5e-3, 1e-3
"""Upper limits, equal to the learning rates in the `finetune` recipe."""


@dataclass(frozen=True)
class ChatSuggestion:
    """A recipe, as YAML with comments and as an object, and the number of its training sequences."""

    yaml: str
    recipe: Recipe
    sequences: int


def suggest_chat_recipe(
    data: ChatSection, run: Run, *, name: str, minutes: float | None = None, reporter: Reporter = SILENT
) -> ChatSuggestion:
    """Suggest a recipe that fine-tunes `run` on the conversations in `data`.

    If `minutes` is None, the number of epochs depends on the number of conversations (see `EPOCHS`).

    Raises `InputError` if the conversations are not valid, if none fits into the context, or if the model is not a decoder.
    """
    model = run.recipe.model
    if not isinstance(model, DecoderSection):
        problem = f"a model with the {model.architecture} architecture cannot be trained on conversations"
        raise InputError(problem, where=str(run.path), hint="use a decoder")
    run.checkpoint()  # raises an error if there is no checkpoint
    parts = read_parts(data, reporter)
    encoder = ChatEncoder(ChatTemplate(), add_control_tokens(run.tokenizer).tokenizer)
    lengths = fitting_lengths(parts.conversations["train"], encoder, model.context_length)
    sequences = len(pack(lengths, model.context_length))
    batch = max(1, min(BATCH_SIZE, sequences // MIN_STEPS_PER_EPOCH))
    count = len(lengths)
    epochs = next((epochs for limit, epochs in EPOCHS if count <= limit), 3)
    length = f"epochs: {epochs}" if minutes is None else f"minutes: {minutes:g}"
    yaml = f"""\
# Fine-tunes {run.path} on {count:,} conversations, in {sequences:,} sequences of up to {model.context_length} tokens.
name: {name}
data:
  format: chat
  train: {_quoted(data.train)}
{_layout_lines(data)}{_mix_lines(run)}\
model: {{init_from: {json.dumps(str(run.path))}, dropout: 0.1}}   # other keys, and the tokenizer, come from that run
objective: {{name: causal_lm, mask_prompt: on}}   # learn only the answers and where they end
training:
  {length}
  global_batch_size: {batch}
  optimizer: {_optimizer(run.recipe)}   # at most a quarter of the rates for training from scratch
  schedule: {{name: linear, warmup: 0.1}}
  # lora: {{rank: 8, alpha: 16}}   # train only small matrices; requires optimizer: {{name: adamw, lr: 2e-3}}
evaluation: {{every: 0.25}}
checkpoint: {{every: 0.25, keep: 1}}
"""
    return ChatSuggestion(yaml, loads(yaml), sequences)


def _quoted(sources: tuple[str, ...]) -> str:
    return json.dumps(sources[0] if len(sources) == 1 else list(sources), ensure_ascii=False)


def _layout_lines(data: ChatSection) -> str:
    lines = []
    for key in ("layout", "messages", "prompt", "response", "errors"):
        value = getattr(data, key)
        if value != ChatSection.model_fields[key].default:
            lines.append(f"  {key}: {json.dumps(value, ensure_ascii=False)}\n")
    return "".join(lines)


def _mix_lines(run: Run) -> str:
    """Return the line that mixes in the run's own training text. Empty if that text is not available."""
    data = run.recipe.data
    if not isinstance(data, DataSection) or not isinstance(data.heldout, HeldoutShare) or data.field != "text" or data.template:
        return ""
    if data.mixture:  # a single held-out share of all sources together would include other text than that run's
        return ""
    sources = data.sources()["train"]
    paths = [os.path.expanduser(source) for source in sources]
    if any(source.startswith(("imported:", "-")) for source in sources):
        return ""
    if not all(":" in source or Path(path).exists() for source, path in zip(sources, paths, strict=True)):
        return ""
    heldout = f"{{share: {data.heldout.share:g}, by: {data.heldout.by}}}"
    return (
        f"  mix: {{text: {_quoted(sources)}, share: {MIX_SHARE:g}, heldout: {heldout}}}"
        "   # text from that run, to reduce forgetting\n"
    )


def _optimizer(recipe: Recipe) -> str:
    before = recipe.training.optimizer
    if isinstance(before, MuonOptimizer):
        return f"{{name: muon, lr: {min(before.lr / 4, MAX_MUON_LR):g}, adamw_lr: {min(before.adamw_lr / 4, MAX_ADAMW_LR):g}}}"
    return f"{{name: adamw, lr: {min(before.lr / 4, MAX_ADAMW_LR):g}}}"
