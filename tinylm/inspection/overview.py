"""Compute what `tinylm inspect` reports about a text: losses, head scores, logit lens and the attribution of one prediction.

Parts that an architecture does not have, such as attention in a recurrent network, are skipped. `missing` contains the reasons.

Legend: `T` tokens in the text, `V` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from tinylm import device as devices
from tinylm.data.framing import Framing
from tinylm.errors import InputError
from tinylm.evaluation.scoring import token_losses, top_logprobs
from tinylm.inspection.attribution import Attribution, attribution
from tinylm.inspection.heads import HeadScores, head_scores
from tinylm.inspection.lens import LensGuesses, lens_guesses
from tinylm.model.base import Model
from tinylm.model.hooks import ActivationCache
from tinylm.recipe.schema import CausalLMObjective
from tinylm.reporting import SILENT, Reporter
from tinylm.run import Checkpoint, Run
from tinylm.tokenizer import Tokenizer
from tinylm.tokenizer.control_tokens import ControlTokens, encode_with_masks

DEFAULT_TOKENS = 128
GUESSES = 10
_BATCH_TOKENS = 2048
_Part = TypeVar("_Part")


@dataclass(frozen=True)
class InspectOptions:
    """Which part of a text to inspect, and which prediction to attribute."""

    max_tokens: int | None = None
    """Inspect only this many tokens from the beginning. The default is `DEFAULT_TOKENS` or the context length if it is smaller."""
    position: int | None = None
    """The position of the attributed prediction, counted from 0. The default is the last one or, for an encoder, the first mask."""
    target: str | None = None
    """The token whose logit is attributed: a text or `@ID`. The default is the most likely token."""
    start_of_document: bool = False
    """Put the end-of-text token before the text, as between documents in training and in `tinylm eval`."""


@dataclass(frozen=True)
class Token:
    """A token in the text. `loss` is in nats, or None if this token is not predicted."""

    id: int
    text: str
    loss: float | None


@dataclass(frozen=True)
class AttributedLogit:
    """One logit as a sum of contributions. `contributions` contains pairs of a component and its contribution."""

    position: int
    target: str
    target_id: int
    contributions: list[tuple[str, float]]
    sum: float
    logit: float


@dataclass(frozen=True)
class ForwardPass:
    """The model and everything it computed from the text."""

    network: Model
    tokens: Tensor
    """(1, T)."""
    logits: Tensor
    """(1, T, V)."""
    cache: ActivationCache


@dataclass(frozen=True)
class Inspection:
    """What a model does with a text."""

    run: Run
    checkpoint: Checkpoint
    text: str
    options: InspectOptions
    forward: ForwardPass
    tokens: list[Token]
    heads: HeadScores | None
    lens: LensGuesses | None
    attributions: Attribution | None
    """The logits of `targets` at every position."""
    targets: list[int]
    """The token whose logit is attributed at each position: the true token, or the requested one at the `attributed` position."""
    attributed: AttributedLogit | None
    predicted_at: int
    """The position whose prediction is sampled: the last one or, for an encoder, the attributed position."""
    next_tokens: list[tuple[int, float]]
    """The most likely tokens at `predicted_at` and their probabilities."""
    missing: dict[str, str] = field(default_factory=dict)
    """The reasons why parts are not available, by the name of the part, such as `loss`, `heads`, `lens` or `attribution`."""

    def token_text(self, id: int) -> str:
        return token_text(self.run.tokenizer, id)

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON document of `tinylm inspect --json`."""
        losses = [token.loss for token in self.tokens if token.loss is not None]
        return {
            "run": str(self.run.path),
            "checkpoint": self.checkpoint.name,
            "step": self.checkpoint.step,
            "tokens": [{"id": token.id, "text": token.text, "loss": token.loss} for token in self.tokens],
            "loss": sum(losses) / len(losses) if losses else None,
            "heads": head_rows(self.heads),
            "logit_lens": self._lens_rows(),
            "attribution": None if self.attributed is None else self._attribution_row(self.attributed),
            "next": [{"token": self.token_text(id), "id": id, "probability": probability} for id, probability in self.next_tokens],
            "not_available": self.missing,
        }

    def _lens_rows(self) -> list[list[list[dict[str, Any]]]]:
        """Return the most likely tokens, indexed by [layer][position]. The first layer is the input to the first block."""
        if self.lens is None:
            return []
        return [
            [
                [{"token": self.token_text(id), "probability": probability} for id, probability in zip(ids, shares, strict=True)]
                for ids, shares in zip(layer_ids, layer_shares, strict=True)
            ]
            for layer_ids, layer_shares in zip(self.lens.ids.tolist(), self.lens.probabilities.tolist(), strict=True)
        ]

    @staticmethod
    def _attribution_row(attributed: AttributedLogit) -> dict[str, Any]:
        return {
            "position": attributed.position,
            "target": attributed.target,
            "target_id": attributed.target_id,
            "contributions": [{"component": component, "logit": logit} for component, logit in attributed.contributions],
            "sum": attributed.sum,
            "logit": attributed.logit,
            "remainder": attributed.logit - attributed.sum,
        }


def head_rows(scores: HeadScores | None) -> list[dict[str, Any]]:
    """Return one row per head for JSON output."""
    if scores is None:
        return []
    layers, heads = scores.induction.shape
    return [
        {
            "layer": layer,
            "head": head,
            "previous_token": float(scores.previous_token[layer, head]),
            "duplicate_token": float(scores.duplicate_token[layer, head]),
            "induction": float(scores.induction[layer, head]),
            "entropy": float(scores.entropy[layer, head]),
            "kind": scores.kind(layer, head),
        }
        for layer in range(layers)
        for head in range(heads)
    ]


def token_text(tokenizer: Tokenizer, id: int) -> str:
    """Return a token's text. Bytes of incomplete characters are written as \\xNN, and special tokens are shown by name."""
    if not 0 <= id < len(tokenizer.token_bytes):
        return f"@{id}"  # a model can have more logits than its tokenizer has tokens
    raw = tokenizer.token_bytes[id]
    if not raw or id == tokenizer.unknown:
        return tokenizer.backend.id_to_token(id) or f"@{id}"
    return raw.decode("utf-8", "backslashreplace")


def token_ids(run: Run, text: str, options: InspectOptions, reporter: Reporter = SILENT) -> list[int]:
    """Return the ids in the inspected part of a text. Raises `InputError` if the text is empty or an option is out of range."""
    context = run.recipe.model.context_length
    limit = min(DEFAULT_TOKENS, context) if options.max_tokens is None else options.max_tokens
    if not 1 <= limit <= context:
        raise InputError(f"must be 1 to {context} (the model's context length), not {limit}", where="--max-tokens")
    if run.recipe.model.bidirectional:
        return _framed_ids(run, text, limit, options, reporter)
    ids = run.tokenizer.encode(text)
    if options.start_of_document:
        if run.tokenizer.end_of_text is None:
            raise InputError("the tokenizer has no end-of-text token", where="--start-of-document")
        ids = [run.tokenizer.end_of_text, *ids]
    if not ids:
        raise InputError("the text is empty", where="--text")
    _warn_if_truncated(len(ids), limit, context, reporter)
    return ids[:limit]


def _framed_ids(run: Run, text: str, limit: int, options: InspectOptions, reporter: Reporter) -> list[int]:
    """Return the ids of a text for an encoder, framed by control tokens. [MASK] in the text becomes a mask token."""
    if options.start_of_document:
        raise InputError("encoders frame a text with their own control tokens", where="--start-of-document", hint="omit it")
    ids = encode_with_masks(run.tokenizer, text)
    if not ids:
        raise InputError("the text is empty", where="--text")
    if limit < 3:
        raise InputError("must be at least 3 for an encoder", where="--max-tokens")
    _warn_if_truncated(len(ids), limit - 2, run.recipe.model.context_length - 2, reporter)
    framed: list[int] = Framing.of(run.tokenizer, run.recipe.model).frame(ids[: limit - 2]).tolist()
    return framed


def _warn_if_truncated(length: int, limit: int, maximum: int, reporter: Reporter) -> None:
    if length > limit:
        hint = f"raise --max-tokens to inspect up to {maximum:,}" if limit < maximum else "no more fit into the context"
        reporter.warn(f"only the first {limit:,} of {length:,} tokens are inspected ({hint})")


@torch.no_grad()
def inspect_text(
    run: Run,
    text: str,
    options: InspectOptions = InspectOptions(),
    *,
    checkpoint: str | None = None,
    device: str = "auto",
    reporter: Reporter = SILENT,
) -> Inspection:
    """Run a checkpoint on a text and summarize what the model computes.

    Raises `InputError` if the text is empty, an option is out of range, or the model does not predict tokens.
    """
    chosen = run.checkpoint(checkpoint)
    ids = token_ids(run, text, options, reporter)
    network = run.network(chosen, devices.resolve(device))
    if network.objective is not None:
        raise InputError("this model predicts labels, not tokens", where=str(run.path), hint="use `tinylm classify`")
    tokens = torch.tensor([ids], device=network.device)
    logits, cache = network.run_with_cache(tokens)
    forward = ForwardPass(network, tokens, logits, cache)
    position = _position(run, forward, options.position)
    missing: dict[str, str] = {}
    truth, losses = _truth(run, forward), _losses(run, forward, missing)
    targets = _targets(run, forward, truth, position, options.target)
    attributions = _available(
        "attribution", missing, lambda: attribution(network, tokens, tokens.new_tensor([targets]), cache=cache)
    )
    return Inspection(
        run=run,
        checkpoint=chosen,
        text=text,
        options=options,
        forward=forward,
        tokens=[Token(id, token_text(run.tokenizer, id), loss) for id, loss in zip(ids, losses, strict=True)],
        heads=_available("heads", missing, lambda: head_scores(network)),
        lens=_available("lens", missing, lambda: lens_guesses(network, tokens, truth, GUESSES, cache)),
        attributions=attributions,
        targets=targets,
        attributed=None if attributions is None else _attributed(attributions, position, targets[position], run.tokenizer),
        predicted_at=len(ids) - 1 if network.is_causal else position,
        next_tokens=_best(logits[0, -1 if network.is_causal else position]),
        missing=missing,
    )


def _position(run: Run, forward: ForwardPass, requested: int | None) -> int:
    """Return the attributed position. The default is the last position.

    For an encoder, the default is the first mask, or the last token of the text if there is no mask.
    """
    length = forward.tokens.shape[1]
    if requested is None and forward.network.is_causal:
        return length - 1
    if requested is None:
        masks = (forward.tokens[0] == ControlTokens.of(run.tokenizer).mask).nonzero().flatten().tolist()
        return int(masks[0]) if masks else length - 2
    if not -length <= requested < length:
        raise InputError(f"must be 0 to {length - 1}, not {requested}", where="--position")
    return requested % length


def _available(name: str, missing: dict[str, str], compute: Callable[[], _Part]) -> _Part | None:
    """Return the result of `compute`, or store the reason in `missing` if the architecture does not have this part."""
    try:
        return compute()
    except InputError as error:
        missing[name] = error.message
        return None


def _truth(run: Run, forward: ForwardPass) -> Tensor:
    """Return the token (T,) that each position should predict, or a negative number if it is unknown.

    This is the next token or, for an encoder, the token at the same position.
    """
    tokens = forward.tokens[0]
    if forward.network.is_causal:
        return torch.cat((tokens[1:], tokens.new_tensor([-1])))
    return tokens.masked_fill(tokens == ControlTokens.of(run.tokenizer).mask, -1)


def _losses(run: Run, forward: ForwardPass, missing: dict[str, str]) -> list[float | None]:
    """Return the loss of each token, or None for tokens that are not predicted, such as the first token and control tokens.

    A causal model predicts each token from the preceding tokens. An encoder predicts each token from all other tokens while that
    token is masked.
    """
    length = forward.tokens.shape[1]
    if not forward.network.is_causal:
        return _masked_losses(run, forward)
    if not isinstance(run.recipe.objective, CausalLMObjective):
        missing["loss"] = f"a model trained with objective {run.recipe.objective.name} does not predict the next token"
        return [None] * length
    return [None, *token_losses(forward.logits[0, :-1], forward.tokens[0, 1:]).tolist()]


def _masked_losses(run: Run, forward: ForwardPass) -> list[float | None]:
    """Mask one token per row and predict it. Returns the loss of each token."""
    mask, tokens = ControlTokens.of(run.tokenizer).mask, forward.tokens[0]
    length = len(tokens)
    losses: list[float | None] = [None] * length
    positions = [index for index in range(1, length - 1) if int(tokens[index]) != mask]
    for chunk in torch.split(torch.tensor(positions, dtype=torch.long), max(1, _BATCH_TOKENS // length)):
        rows, numbers = tokens.repeat(len(chunk), 1), torch.arange(len(chunk))
        rows[numbers, chunk] = mask
        values = token_losses(forward.network(rows)[numbers, chunk], tokens[chunk]).tolist()
        for index, value in zip(chunk.tolist(), values, strict=True):
            losses[index] = value
    return losses


def _targets(run: Run, forward: ForwardPass, truth: Tensor, position: int, requested: str | None) -> list[int]:
    """Return the token to attribute at each position: the true token, or the most likely token if the true one is unknown.

    At `position`, this is the requested token or, by default, the most likely token.
    """
    best = forward.logits[0].argmax(-1)
    targets: list[int] = torch.where(truth >= 0, truth, best).tolist()
    if requested is None:
        targets[position] = int(best[position])
        return targets
    try:
        targets[position] = run.tokenizer.token_id(requested)
    except InputError as error:
        raise InputError(error.message, where="--target", hint=error.hint) from None
    return targets


def _attributed(attributions: Attribution, position: int, target: int, tokenizer: Tokenizer) -> AttributedLogit:
    values = attributions.contributions[:, 0, position].tolist()
    return AttributedLogit(
        position=position,
        target=token_text(tokenizer, target),
        target_id=target,
        contributions=list(zip(attributions.components, values, strict=True)),
        sum=math.fsum(values),
        logit=float(attributions.logits[0, position]),
    )


def _best(logits: Tensor) -> list[tuple[int, float]]:
    ids, logprobs = top_logprobs(logits, GUESSES)
    return list(zip(ids.tolist(), logprobs.exp().tolist(), strict=True))
