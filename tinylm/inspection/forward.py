"""Run a model of any architecture on an inspected text, and keep its activations.

Legend: `T` tokens in the text, `S` source tokens, `C` width, `V` vocabulary or labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from tinylm.evaluation.scoring import token_losses
from tinylm.inspection.heads import HeadScores, head_scores, repeated_tokens
from tinylm.model.base import Model
from tinylm.model.classifier import SequenceClassifier, text_hidden
from tinylm.model.decomposition import hook_names
from tinylm.model.encoder_decoder import EncoderDecoder
from tinylm.model.hooks import ActivationCache, NameFilter
from tinylm.model.layers import Memory
from tinylm.run import Run
from tinylm.tokenizer.control_tokens import ControlTokens

Task = Literal["causal_lm", "masked_lm", "classification", "translation"]
"""What a model predicts: the next token, masked tokens, a label, or the next token of a translation."""
_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class ForwardPass:
    """The model and everything it computed from the text."""

    model: Model
    network: Model
    """The part of `model` whose activations are shown: the model itself, a classifier's body, or a translator's decoder."""
    tokens: Tensor
    """(1, T). A translator's tokens are those of the translation, after `START`."""
    logits: Tensor
    """(1, T, V). An encoder's logits at a token are computed while this token is masked. A classifier's logits are (1, 1, V)."""
    cache: ActivationCache
    predictions: ActivationCache
    """The activations that determine the logits. They differ from `cache` for an encoder, where each token is masked in turn."""
    source: Tensor | None = None
    """(1, S): a translator's source tokens."""
    source_cache: ActivationCache = field(default_factory=ActivationCache)
    """The activations of a translator's encoder."""
    memory: Memory | None = None
    """The input of a translator's cross-attention."""

    @property
    def task(self) -> Task:
        return task_of(self.model)

    @property
    def encoder(self) -> Model:
        """The part of a translator that reads the source text."""
        assert isinstance(self.model, EncoderDecoder)
        return self.model.encoder

    def head_scores(self) -> HeadScores:
        """Score the heads of `network`. A translator's decoder also attends to the source text.

        Raises `InputError` if the network has no attention.
        """
        if self.memory is None or self.memory.hidden is None:
            return head_scores(self.network)
        tokens = repeated_tokens(self.network)
        return head_scores(self.network, tokens, memory=Memory(self.memory.hidden.expand(len(tokens), -1, -1)))


def task_of(model: Model) -> Task:
    """Return what a model predicts."""
    if isinstance(model, EncoderDecoder):
        return "translation"
    if isinstance(model, SequenceClassifier):
        return "classification"
    return "causal_lm" if model.is_causal else "masked_lm"


@torch.no_grad()
def forward_pass(
    run: Run, model: Model, ids: Sequence[int], source: Sequence[int] = (), names: NameFilter | None = None
) -> ForwardPass:
    """Run a model on the ids of a text.

    `source` contains a translator's source ids. `names` selects the activations to keep; the default is all.
    """
    tokens = torch.tensor([list(ids)], device=model.device)
    if isinstance(model, EncoderDecoder):
        return _translator_pass(model, tokens, torch.tensor([list(source)], device=model.device), names)
    if isinstance(model, SequenceClassifier):
        with model.body.caching(names) as cache:
            logits = model.label_logits(text_hidden(model.body, tokens, None))
        return ForwardPass(model, model.body, tokens, logits[:, None], cache, cache)
    logits, cache = model.run_with_cache(tokens, names)
    if model.is_causal:
        return ForwardPass(model, model, tokens, logits, cache, cache)
    return _masked_pass(model, tokens, logits, cache, ControlTokens.of(run.tokenizer).mask)


def _translator_pass(model: EncoderDecoder, tokens: Tensor, source: Tensor, names: NameFilter | None) -> ForwardPass:
    with model.encoder.caching() as source_cache:
        memory = model.encode(source)
    with model.decoder.caching(names) as cache:
        logits = model.logits(model.decoder.hidden(tokens, memory=memory))
    return ForwardPass(model, model.decoder, tokens, logits, cache, cache, source, source_cache, memory)


def _masked_pass(model: Model, tokens: Tensor, logits: Tensor, cache: ActivationCache, mask: int) -> ForwardPass:
    """Mask one token of the text per row, and collect the logits and activations at the masked tokens."""
    length = tokens.shape[1]
    residuals = [f"blocks.{layer}.{name}" for layer in range(model.depth) for name in ("resid_pre", "resid_post")]
    names = [name for name in model.hook_names() if name in residuals or name in hook_names(model)]
    predictions = ActivationCache({name: cache[name].clone() for name in names if name in cache})
    logits = logits.clone()
    positions = [index for index in range(1, length - 1) if int(tokens[0, index]) != mask]
    if not positions:
        return ForwardPass(model, model, tokens, logits, cache, predictions)
    for chosen in torch.split(torch.tensor(positions, dtype=torch.long, device=tokens.device), max(1, _BATCH_TOKENS // length)):
        rows, numbers = tokens.repeat(len(chosen), 1), torch.arange(len(chosen), device=tokens.device)
        rows[numbers, chosen] = mask
        with model.caching(list(predictions)) as masked:
            hidden = model.hidden(rows)
        logits[0, chosen] = model.logits(hidden[numbers, chosen])
        for name, values in masked.items():
            predictions[name][0, chosen] = values[numbers, chosen]
    return ForwardPass(model, model, tokens, logits, cache, predictions)


def truth_of(run: Run, forward: ForwardPass, end: int = -1) -> Tensor:
    """Return the token (T,) that each position should predict, or a negative number if it is unknown.

    This is the next token or, for an encoder, the token at the same position. `end` is the token after the last one.
    """
    tokens = forward.tokens[0]
    if forward.task != "masked_lm":
        return torch.cat((tokens[1:], tokens.new_tensor([end])))
    truth = tokens.masked_fill(tokens == ControlTokens.of(run.tokenizer).mask, -1)
    truth[[0, -1]] = -1  # the control tokens around the text
    return truth


def token_losses_of(forward: ForwardPass, truth: Tensor) -> list[float | None]:
    """Return the loss of each token, or None for tokens that are not predicted, such as the first token and control tokens.

    A causal model and a translator predict each token from the preceding tokens. An encoder predicts each token from all other
    tokens while that token is masked. A classifier does not predict tokens.
    """
    if forward.task == "classification":
        return [None] * forward.tokens.shape[1]
    if forward.task != "masked_lm":
        return [None, *token_losses(forward.logits[0, :-1], forward.tokens[0, 1:]).tolist()]
    losses = token_losses(forward.logits[0], truth).tolist()
    return [loss if token >= 0 else None for loss, token in zip(losses, truth.tolist(), strict=True)]
