"""Compute what `tinylm inspect` reports about a text: losses, head scores, logit lens and the attribution of one prediction.

Parts that an architecture does not have, such as attention in a recurrent network, are skipped. `missing` contains the reasons.

Legend: `T` tokens in the text, `S` source tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from tinylm import device as devices
from tinylm.errors import InputError
from tinylm.evaluation.scoring import top_logprobs
from tinylm.inspection.attribution import Attribution, attribution, label_attribution
from tinylm.inspection.forward import ForwardPass, forward_pass, token_losses_of, truth_of
from tinylm.inspection.heads import HeadScores, head_scores
from tinylm.inspection.input import InspectOptions, ModelInput, read_input
from tinylm.inspection.lens import LensGuesses, label_guesses, lens_guesses
from tinylm.model.classifier import SequenceClassifier
from tinylm.model.sequence_to_sequence import START
from tinylm.recipe.chat import DPOObjective
from tinylm.recipe.schema import CausalLMObjective
from tinylm.reporting import SILENT, Reporter
from tinylm.run import Checkpoint, Run
from tinylm.tokenizer import Tokenizer
from tinylm.tokenizer.control_tokens import ControlTokens
from tinylm.translation.translator import source_tokenizer_of

GUESSES = 10
START_TEXT = "<start>"
"""The name of the position before a translation."""
_Part = TypeVar("_Part")


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
class SourceText:
    """The text that a translator reads, and how the translation depends on it."""

    text: str
    tokens: list[Token]
    heads: HeadScores
    """The scores of the encoder's heads."""
    alignment: Tensor
    """(T, S): the last decoder block's cross-attention when it predicts the token after each position, averaged over heads."""
    generated: bool
    """Whether the translation is the model's own."""


@dataclass(frozen=True)
class Inspection:
    """What a model does with a text."""

    run: Run
    checkpoint: Checkpoint
    text: str
    """The text that `tokens` were cut from. For a translator, this is the translation."""
    options: InspectOptions
    input: ModelInput
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
    """The position whose prediction is sampled: the last one or, for an encoder and a translator, the attributed position."""
    next_tokens: list[tuple[int, float]]
    """The most likely tokens, or a classifier's most likely labels, at `predicted_at` and their probabilities."""
    source: SourceText | None = None
    """The source text of a translator."""
    missing: dict[str, str] = field(default_factory=dict)
    """The reasons why parts are not available, by the name of the part, such as `loss`, `heads`, `lens` or `attribution`."""

    @property
    def labels(self) -> list[str] | None:
        """The labels of a classifier, whose logits, lens and attributions refer to labels instead of tokens."""
        model = self.forward.model
        return list(model.objective.labels) if isinstance(model, SequenceClassifier) else None

    def token_text(self, id: int) -> str:
        return token_text(self.run.tokenizer, id)

    def output_text(self, id: int) -> str:
        """Return the text of a predicted token, or a classifier's label."""
        return self.token_text(id) if self.labels is None else self.labels[id]

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
            **self._predictions(),
            **({} if self.source is None else {"source": self._source_row(self.source)}),
            "not_available": self.missing,
        }

    def _predictions(self) -> dict[str, Any]:
        if self.labels is not None:
            return {"labels": [{"label": self.labels[id], "probability": probability} for id, probability in self.next_tokens]}
        return {"next": [{"token": self.token_text(id), "id": id, "probability": p} for id, p in self.next_tokens]}

    @staticmethod
    def _source_row(source: SourceText) -> dict[str, Any]:
        return {
            "tokens": [{"id": token.id, "text": token.text} for token in source.tokens],
            "heads": head_rows(source.heads),
            "alignment": source.alignment.tolist(),
        }

    def _lens_rows(self) -> list[list[list[dict[str, Any]]]]:
        """Return the most likely tokens, indexed by [layer][position]. The first layer is the input to the first block."""
        if self.lens is None:
            return []
        key = "token" if self.labels is None else "label"
        return [
            [
                [{key: self.output_text(id), "probability": probability} for id, probability in zip(ids, shares, strict=True)]
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
    if id == START:
        return START_TEXT
    if not 0 <= id < len(tokenizer.token_bytes):
        return f"@{id}"  # a model can have more logits than its tokenizer has tokens
    raw = tokenizer.token_bytes[id]
    if not raw or id == tokenizer.unknown:
        return tokenizer.backend.id_to_token(id) or f"@{id}"
    return raw.decode("utf-8", "backslashreplace")


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

    Raises `InputError` if the architecture is not supported, the text is empty, or an option is out of range.
    """
    chosen = run.checkpoint(checkpoint)
    if not run.recipe.model.inspectable:
        problem = f"models with the {run.recipe.model.architecture} architecture cannot be inspected"
        raise InputError(problem, where=str(run.path), hint="`tinylm translate --attention` shows the alignment")
    model = run.network(chosen, devices.resolve(device))
    given = read_input(run, model, text, options, reporter)
    forward = forward_pass(run, model, given.ids, given.source)
    truth = truth_of(run, forward, given.end)
    position = _position(run, forward, options.position)
    missing: dict[str, str] = {}
    losses = token_losses_of(forward, truth)
    if forward.task == "classification":
        missing["loss"] = "a classifier predicts a label, not tokens"
    elif forward.task == "causal_lm" and not isinstance(run.recipe.objective, CausalLMObjective | DPOObjective):
        missing["loss"] = f"a model trained with the {run.recipe.objective.name} objective does not predict the next token"
        losses = [None] * len(losses)
    targets = _targets(run, forward, truth, position, options.target)
    attributions = _available("attribution", missing, lambda: _attributions(forward, targets))
    outputs = model.objective.labels if isinstance(model, SequenceClassifier) else None
    wanted = targets[position]
    shown = token_text(run.tokenizer, wanted) if outputs is None else outputs[wanted]
    attributed = None if attributions is None else _attributed(attributions, position, wanted, shown)
    at = forward.logits.shape[1] - 1 if forward.task == "causal_lm" else position
    return Inspection(
        run=run,
        checkpoint=chosen,
        text=given.text,
        options=options,
        input=given,
        forward=forward,
        tokens=[Token(id, token_text(run.tokenizer, id), loss) for id, loss in zip(given.ids, losses, strict=True)],
        heads=_available("heads", missing, forward.head_scores),
        lens=_available("lens", missing, lambda: _lens(forward, truth)),
        attributions=attributions,
        targets=targets,
        attributed=attributed,
        predicted_at=at,
        next_tokens=_best(forward.logits[0, at]),
        source=_source(run, forward, text, given) if forward.task == "translation" else None,
        missing=missing,
    )


def _lens(forward: ForwardPass, truth: Tensor) -> LensGuesses:
    if isinstance(forward.model, SequenceClassifier):
        return label_guesses(forward.model, forward.cache)
    return lens_guesses(forward.network, forward.tokens, truth, GUESSES, forward.predictions)


def _attributions(forward: ForwardPass, targets: list[int]) -> Attribution:
    if isinstance(forward.model, SequenceClassifier):
        return label_attribution(forward.model, targets[0], None, forward.cache)
    ids = forward.tokens.new_tensor([targets])
    return attribution(forward.network, forward.tokens, ids, cache=forward.predictions)


def _source(run: Run, forward: ForwardPass, text: str, given: ModelInput) -> SourceText:
    tokenizer = source_tokenizer_of(run)
    pattern = forward.cache[f"blocks.{forward.network.depth - 1}.cross_attention.pattern"]
    return SourceText(
        text=text,
        tokens=[Token(id, token_text(tokenizer, id), None) for id in given.source],
        heads=head_scores(forward.encoder),
        alignment=pattern[0].mean(0),
        generated=given.generated,
    )


def _position(run: Run, forward: ForwardPass, requested: int | None) -> int:
    """Return the attributed position. The default is the last position.

    For an encoder, the default is the first mask, or the last token of the text if there is no mask. For a translator, it is the
    position before the first token of the translation. A classifier has one position.
    """
    length = forward.logits.shape[1]
    if requested is not None:
        if not -length <= requested < length:
            raise InputError(f"must be 0 to {length - 1}, not {requested}", where="--position")
        return requested % length
    if forward.task == "masked_lm":
        masks = (forward.tokens[0] == ControlTokens.of(run.tokenizer).mask).nonzero().flatten().tolist()
        return int(masks[0]) if masks else length - 2
    return 0 if forward.task == "translation" else length - 1


def _available(name: str, missing: dict[str, str], compute: Callable[[], _Part]) -> _Part | None:
    """Return the result of `compute`, or store the reason in `missing` if the architecture does not have this part."""
    try:
        return compute()
    except InputError as error:
        missing[name] = error.message
        return None


def _targets(run: Run, forward: ForwardPass, truth: Tensor, position: int, requested: str | None) -> list[int]:
    """Return the token to attribute at each position: the true token, or the most likely token if the true one is unknown.

    At `position`, this is the requested token or, by default, the most likely token. A classifier's target is a label.
    """
    best = forward.logits[0].argmax(-1)
    labels = forward.model.objective.labels if isinstance(forward.model, SequenceClassifier) else None
    targets: list[int] = best.tolist() if labels is not None else torch.where(truth >= 0, truth, best).tolist()
    if requested is None:
        targets[position] = int(best[position])
    elif labels is None:
        targets[position] = _requested_token(run.tokenizer, requested)
    elif requested in labels:
        targets[position] = labels.index(requested)
    else:
        raise InputError(f"{requested!r} is not a label", where="--target", hint=f"choose from {', '.join(labels)}")
    return targets


def _requested_token(tokenizer: Tokenizer, requested: str) -> int:
    try:
        return tokenizer.token_id(requested)
    except InputError as error:
        raise InputError(error.message, where="--target", hint=error.hint) from None


def _attributed(attributions: Attribution, position: int, target: int, text: str) -> AttributedLogit:
    values = attributions.contributions[:, 0, position].tolist()
    return AttributedLogit(
        position=position,
        target=text,
        target_id=target,
        contributions=list(zip(attributions.components, values, strict=True)),
        sum=math.fsum(values),
        logit=float(attributions.logits[0, position]),
    )


def _best(logits: Tensor) -> list[tuple[int, float]]:
    ids, logprobs = top_logprobs(logits, GUESSES)
    return list(zip(ids.tolist(), logprobs.exp().tolist(), strict=True))
