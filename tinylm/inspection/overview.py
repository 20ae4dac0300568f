"""What `tinylm inspect` reports about a text: losses, head scores, logit lens and attribution of one prediction.

A part that an architecture does not have, such as attention in a recurrent network, is left out, with the reason in `missing`.

Legend: `T` tokens of the text, `V` vocabulary.
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
    """Which part of a text is inspected, and which prediction is attributed."""

    max_tokens: int | None = None
    """Inspect only this many tokens from the beginning; None: `DEFAULT_TOKENS`, or the context length if that is less."""
    position: int | None = None
    """The token after which the attributed prediction is made, counted from 0; None: the last one."""
    target: str | None = None
    """The token whose logit is attributed; None: the most likely one. A text or `@ID`."""
    start_of_document: bool = False
    """Put the end-of-text token before the text, as between documents in training and in `tinylm eval`."""


@dataclass(frozen=True)
class Token:
    """A token of the text. `loss` is in nats, None where nothing is predicted."""

    id: int
    text: str
    loss: float | None


@dataclass(frozen=True)
class AttributedLogit:
    """One logit as a sum of contributions. `contributions` are pairs of a component and its share of the logit."""

    position: int
    target: str
    target_id: int
    contributions: list[tuple[str, float]]
    sum: float
    logit: float


@dataclass(frozen=True)
class ForwardPass:
    """The model, and everything that it computed from the text."""

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
    """For each position, the token whose logit is attributed: the one that follows, and for `attributed` the requested one."""
    attributed: AttributedLogit | None
    predicted_at: int
    """The position whose prediction is sampled: the last one, or for an encoder the attributed position."""
    next_tokens: list[tuple[int, float]]
    """The most likely tokens there, and their probabilities."""
    missing: dict[str, str] = field(default_factory=dict)
    """Why a part is not available, by its name: loss, heads, lens, attribution."""

    def token_text(self, id: int) -> str:
        return token_text(self.run.tokenizer, id)

    def as_dict(self) -> dict[str, Any]:
        """The JSON document of `tinylm inspect --json`."""
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
        """[layer][position] -> the best guesses. The first layer is the input of the first block."""
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
    """One row per head, for JSON."""
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
    """The text of a token. Bytes of incomplete characters are written as \\xNN, and special tokens by their name."""
    if not 0 <= id < len(tokenizer.token_bytes):
        return f"@{id}"  # a model may have more logits than its tokenizer has tokens
    raw = tokenizer.token_bytes[id]
    if not raw or id == tokenizer.unknown:
        return tokenizer.backend.id_to_token(id) or f"@{id}"
    return raw.decode("utf-8", "backslashreplace")


def token_ids(run: Run, text: str, options: InspectOptions, reporter: Reporter = SILENT) -> list[int]:
    """The ids of the inspected part of a text. Raises `InputError` if it is empty or an option is out of range."""
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
    _warn_if_cut(len(ids), limit, context, reporter)
    return ids[:limit]


def _framed_ids(run: Run, text: str, limit: int, options: InspectOptions, reporter: Reporter) -> list[int]:
    """The ids of a text for an encoder, in which [MASK] is a masked token, between its control tokens."""
    if options.start_of_document:
        raise InputError("an encoder reads a text between its own control tokens", where="--start-of-document")
    ids = encode_with_masks(run.tokenizer, text)
    if not ids:
        raise InputError("the text is empty", where="--text")
    if limit < 3:
        raise InputError("must be at least 3 for an encoder", where="--max-tokens")
    _warn_if_cut(len(ids), limit - 2, run.recipe.model.context_length - 2, reporter)
    framed: list[int] = Framing.of(run.tokenizer, run.recipe.model).frame(ids[: limit - 2]).tolist()
    return framed


def _warn_if_cut(length: int, limit: int, most: int, reporter: Reporter) -> None:
    if length > limit:
        hint = f"--max-tokens shows more, up to {most:,}" if limit < most else "the context holds no more"
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
    """Run a checkpoint on a text and summarize what happens.

    Raises `InputError` for an empty text, an option that is out of range, or a model that does not accept plain text.
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
    """The attributed position: the last one, or for an encoder the first mask, or else the last token of the text."""
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
    """The result of `compute`, or None and the reason in `missing` if the architecture does not have this part."""
    try:
        return compute()
    except InputError as error:
        missing[name] = error.message
        return None


def _truth(run: Run, forward: ForwardPass) -> Tensor:
    """The token that each position should predict (T,): the next one, or for an encoder the same one; negative if unknown."""
    tokens = forward.tokens[0]
    if forward.network.is_causal:
        return torch.cat((tokens[1:], tokens.new_tensor([-1])))
    return tokens.masked_fill(tokens == ControlTokens.of(run.tokenizer).mask, -1)


def _losses(run: Run, forward: ForwardPass, missing: dict[str, str]) -> list[float | None]:
    """The loss of each token. The first token of a text, and control tokens, have none.

    A causal model predicts a token from those before it. An encoder predicts it from all others, with this token masked.
    """
    length = forward.tokens.shape[1]
    if not forward.network.is_causal:
        return _masked_losses(run, forward)
    if not isinstance(run.recipe.objective, CausalLMObjective):
        missing["loss"] = f"a model trained with objective {run.recipe.objective.name} does not predict the next token"
        return [None] * length
    return [None, *token_losses(forward.logits[0, :-1], forward.tokens[0, 1:]).tolist()]


def _masked_losses(run: Run, forward: ForwardPass) -> list[float | None]:
    """Mask one token per row, and predict it."""
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
    """The true token of each position; the requested or the most likely one at `position`, and where the true one is unknown."""
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
