"""Predict the most likely tokens for each [MASK] in a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tinylm.data.framing import Framing
from tinylm.errors import InputError
from tinylm.evaluation.scoring import top_logprobs
from tinylm.model.base import Model, evaluation_mode
from tinylm.recipe.encoder import MASK
from tinylm.run import Run
from tinylm.tokenizer import Tokenizer
from tinylm.tokenizer.control_tokens import ControlTokens, encode_with_masks, split_at_masks
from tinylm.tokenizer.tokenizer import DecodingRules


@dataclass(frozen=True)
class Candidate:
    """A token that could replace a mask. `token` is its text, including the leading space if there is one."""

    id: int
    token: str
    probability: float


@dataclass(frozen=True)
class FilledMask:
    """The most likely tokens for one mask, most likely first. `position` is the index of the mask among the text's tokens."""

    position: int
    candidates: list[Candidate]


@dataclass(frozen=True)
class FilledText:
    """A text with masks and the candidates for each mask. `filled` is the text with the most likely token in place of each mask."""

    text: str
    filled: str
    masks: list[FilledMask]

    @property
    def filled_line(self) -> str:
        """`filled` on one line, with newlines written as `\\n` and `\\r`."""
        return self.filled.replace("\n", "\\n").replace("\r", "\\r")

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON document of `tinylm fill --json`."""
        masks = [
            {"position": mask.position, "candidates": [vars(candidate) for candidate in mask.candidates]} for mask in self.masks
        ]
        return {"text": self.text, "filled": self.filled, "masks": masks}


def require_masked_model(network: Model) -> None:
    """Raise `InputError` unless the network predicts masked tokens."""
    if network.is_causal or network.objective is not None:
        kind = network.architecture if network.is_causal else f"objective {network.objective.name if network.objective else ''}"
        raise InputError(
            f"this model ({kind}) does not predict masked tokens",
            where="--run",
            hint="choose a run trained with the masked_lm objective",
        )


def require_head(run: Run) -> None:
    """Raise `InputError` if the run was imported from a model without a head."""
    if not run.has_head:
        raise InputError(
            "this model was imported without a head, so it cannot predict masked tokens",
            where=str(run.path),
            hint="compute sentence vectors with `tinylm embed from-run --which sentence`, or fine-tune it with model.init_from",
        )


@torch.no_grad()
def fill(network: Model, tokenizer: Tokenizer, text: str, top: int = 5) -> FilledText:
    """Predict all [MASK] tokens in a text with one forward pass. Returns `top` candidates for each.

    Raises `InputError` if the text has no mask or does not fit into the context, or if the network does not predict masked tokens.
    """
    require_masked_model(network)
    framing, mask = Framing.of(tokenizer, network.model), ControlTokens.of(tokenizer).mask
    ids = np.array(encode_with_masks(tokenizer, text), dtype=np.int64)
    positions = np.flatnonzero(ids == mask)
    if not len(positions):
        raise InputError(f"the text has no {MASK}", where=repr(text[:40]), hint=f"write {MASK} for each token to predict")
    if len(ids) > framing.room:
        raise InputError(
            f"the text has {len(ids)} tokens, but only {framing.room} fit into the context",
            where=repr(text[:40]),
            hint="shorten it",
        )
    tokens = torch.from_numpy(framing.frame(ids))[None].to(network.device)
    with evaluation_mode(network):
        hidden = network.hidden(tokens)[0, torch.from_numpy(positions + 1).to(network.device)]
        top_ids, logprobs = top_logprobs(network.logits(hidden), top)
    masks = [
        FilledMask(int(position), [Candidate(id, token_text(tokenizer, id), p) for id, p in zip(row, probabilities, strict=True)])
        for position, row, probabilities in zip(positions, top_ids.tolist(), logprobs.exp().tolist(), strict=True)
    ]
    return FilledText(text, _splice(tokenizer, split_at_masks(tokenizer, text), [mask.candidates[0].id for mask in masks]), masks)


def _splice(tokenizer: Tokenizer, parts: Sequence[str], ids: Sequence[int]) -> str:
    """Return the text that results from writing one token after each part except the last. The parts do not change.

    If encoding drops whitespace, a token that begins a word is written with a space only after a letter or digit, and a token that
    continues a word replaces the space before it.
    """
    space_before = DecodingRules.from_json(tokenizer.tokenizer_json).space_before
    filled = b""
    for part, id in zip(parts, ids, strict=False):
        filled += part.encode()
        token = tokenizer.token_bytes[id]
        begins_word = token.startswith(b" ")
        if space_before == "always" and not begins_word:
            filled = filled.removesuffix(b" ")
        elif (space_before == "always" and not filled[-1:].isalnum()) or (space_before == "once" and not filled):
            token = token.removeprefix(b" ")
        filled += token
    return (filled + parts[-1].encode()).decode("utf-8", "replace")


def token_text(tokenizer: Tokenizer, id: int) -> str:
    """Return a token's text, or its name if it has no text."""
    text = tokenizer.token_bytes[id].decode("utf-8", "replace")
    return text or str(tokenizer.backend.id_to_token(id))
