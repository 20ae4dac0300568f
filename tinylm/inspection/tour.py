"""The guided tour that `tinylm explain` shows: from characters to a gradient step, with numbers from the user's own model."""

from __future__ import annotations

import html
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tinylm.errors import InputError
from tinylm.evaluation.scoring import token_losses
from tinylm.inspection.overview import Inspection
from tinylm.inspection.templates import fill, read
from tinylm.recipe.schema import TransformerSection
from tinylm.tokenizer.explain import explain, visible

_OUTPUTS = {
    "causal_lm": ("token in the vocabulary", "as the next token"),
    "masked_lm": ("token in the vocabulary", "in the place of the masked token"),
    "classification": ("label", "the text"),
    "translation": ("token in the vocabulary", "as the next token of the translation"),
}
"""What a model's logits belong to, and what a high logit means."""
MAX_WORDS = 80
"""Maximum number of words in the text of a step."""
_LEARNING_RATE = 0.01
_SHOWN = 5


@dataclass(frozen=True)
class Step:
    """One step of the tour: a general explanation, and numbers from this model as pairs of a label and a value."""

    title: str
    text: str
    numbers: list[tuple[str, str]]


def tour(inspection: Inspection, *, seed: int = 0) -> list[Step]:
    """Return the steps of the tour for the inspected text. `seed` determines the sampled token.

    Steps that do not apply to the architecture say so. Raises `InputError` if the text has fewer than two tokens.
    """
    if len(inspection.tokens) < 2:
        raise InputError("must have at least two tokens, because the first token is not predicted", where="--text")
    builders: list[Callable[[], Step]] = [
        lambda: _characters(inspection.text if inspection.source is None else inspection.source.text),
        lambda: _tokens(inspection),
        lambda: _embedding(inspection),
        lambda: _positions(inspection),
        lambda: _one_head(inspection),
        lambda: _many_heads(inspection),
        *([] if inspection.source is None else [lambda: _cross_attention(inspection)]),
        lambda: _residual(inspection),
        lambda: _feed_forward(inspection),
        lambda: _blocks(inspection),
        lambda: _logits(inspection),
        lambda: _softmax(inspection),
        lambda: _sampling(inspection, seed),
        lambda: _loss(inspection),
        lambda: _gradient_step(inspection),
    ]
    return [build() for build in builders]


def as_html(steps: list[Step], title: str) -> str:
    """Return the tour as one HTML file that works offline."""
    sections = []
    for number, step in enumerate(steps, 1):
        rows = "".join(f"<tr><th>{html.escape(label)}</th><td>{html.escape(value)}</td></tr>" for label, value in step.numbers)
        heading = f"<h2>{number}. {html.escape(step.title)}</h2>"
        table = f'<div class="scroll" tabindex="0"><table>{rows}</table></div>' if rows else ""
        sections.append(f'<section id="step-{number}">{heading}<p>{html.escape(step.text)}</p>{table}</section>')
    content = {
        "TITLE": html.escape(title),
        "STYLE": read("page.css"),
        "CONTENTS": "".join(f'<li><a href="#step-{n}">{html.escape(step.title)}</a></li>' for n, step in enumerate(steps, 1)),
        "STEPS": "\n".join(sections),
    }
    return fill(read("tour.html"), content)


def _quote(text: str) -> str:
    return f"[{visible(text)}]"


def _numbers(values: Tensor) -> str:
    shown = ", ".join(f"{value:.3f}" for value in values[:6].tolist())
    return f"{shown}{', ...' if len(values) > 6 else ''}"


def _not_available(inspection: Inspection, title: str, part: str) -> Step:
    reason = inspection.missing.get(
        part, f"a model with the {inspection.forward.model.architecture} architecture does not have this"
    )
    return Step(title, f"Not in this model: {reason}.", [])


# From text to vectors.


def _characters(text: str) -> Step:
    first = [(f"{character!r}", f"U+{ord(character):04X}, bytes {character.encode().hex(' ')}") for character in text[:_SHOWN]]
    size = ("the text", f"{len(text):,} characters, {len(text.encode()):,} bytes")
    return Step("Characters", "A computer stores a text as characters, and each character as one to four bytes.", [size, *first])


def _tokens(inspection: Inspection) -> Step:
    numbers = [("tokens", " ".join(f"{_quote(token.text)}={token.id}" for token in inspection.tokens[:12]))]
    try:
        words = explain(inspection.run.tokenizer, inspection.text).words
    except InputError:
        words = []
    longest = max(words, key=lambda word: len(word.steps), default=None)
    if longest is not None:
        numbers += [(step.description, " ".join(_quote(part) for part in step.parts)) for step in longest.steps[:8]]
    note = (
        "A tokenizer splits the text into tokens from a fixed vocabulary, and the model sees only their ids. The vocabulary "
        "contains the most frequent pieces of the training text, so a common word is one token and a rare word is several."
    )
    return Step("Tokens", note, numbers)


def _embedding(inspection: Inspection) -> Step:
    network, token = inspection.forward.network, inspection.tokens[-1]
    try:
        table = network.input_embedding().weight.detach()
    except InputError as error:
        return Step("Embedding", f"Not in this model: {error.message}.", [])
    vector = table[token.id]
    similarity = torch.nn.functional.cosine_similarity(vector[None], table)
    similarity[token.id] = -2
    best = similarity.topk(min(3, len(table) - 1))
    near = ", ".join(
        f"{_quote(inspection.token_text(id))} {value:.2f}"
        for id, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    )
    note = (
        "A token's id selects a row in a table of vectors. Training moved the vectors of tokens that are used in similar ways "
        "closer together. From here on, the model computes only with vectors."
    )
    numbers = [(f"vector of {_quote(token.text)}", f"{len(vector)} numbers: {_numbers(vector)}"), ("most similar", near)]
    return Step("Embedding", note, numbers)


def _positions(inspection: Inspection) -> Step:
    network, cache = inspection.forward.network, inspection.forward.cache
    position = len(inspection.tokens) - 1
    title = "Positions"
    if "pos_embed" in cache:
        vector = cache["pos_embed"][0, position]
        note = "An embedding does not contain a token's position. This model adds a vector for each position to the embedding."
        return Step(title, note, [(f"vector of position {position}", _numbers(vector)), ("length", f"{float(vector.norm()):.3f}")])
    model = network.model
    if not isinstance(model, TransformerSection) or model.position != "rope":
        return Step(title, "This model does not add positions to its vectors.", [])
    theta, width = model.rope_theta or 10000.0, model.head_width
    note = (
        "This model rotates queries and keys by angles that grow with the position (rotary embeddings). Their dot product then "
        "depends on the distance between two tokens."
    )
    angles = [theta ** (-2 * pair / width) for pair in (0, 1, width // 2 - 1)]
    turns = ", ".join(f"{position * angle:.4g}" for angle in angles)
    numbers = [(f"angles at position {position}", f"{turns} (first, second and last pair, in radians)")]
    return Step(title, note, numbers)


# Inside the blocks.


def _one_head(inspection: Inspection) -> Step:
    title, scores, cache = "One attention head by hand", inspection.heads, inspection.forward.cache
    if scores is None:
        return _not_available(inspection, title, "heads")
    layer, head = scores.strongest()[0]
    query = len(inspection.tokens) - 1
    q = cache[f"blocks.{layer}.attn.q"][0, query, head]
    keys = cache[f"blocks.{layer}.attn.k"][0]
    k = keys[:, head * keys.shape[1] // cache[f"blocks.{layer}.attn.q"].shape[2]]
    weights = cache[f"blocks.{layer}.attn.pattern"][0, head, query]
    root = math.sqrt(len(q))
    numbers = [("head", f"layer {layer}, head {head}; query: {_quote(inspection.tokens[query].text)} at position {query}")]
    for key in weights.topk(min(_SHOWN, len(weights))).indices.tolist():
        dot = float(q @ k[key])
        value = f"q·k = {dot:.3f}, / √{len(q)} = {dot / root:.3f}, softmax over all keys = {float(weights[key]):.3f}"
        numbers.append((f"key {_quote(inspection.tokens[key].text)} at {key}", value))
    note = (
        "Each token produces a query, a key and a value. The score is the dot product of a query and a key, divided by the square "
        "root of the head width. The softmax turns scores into weights, and the head returns the weighted mean of the values."
    )
    return Step(title, note, numbers)


def _many_heads(inspection: Inspection) -> Step:
    title, scores = "Many heads", inspection.heads
    if scores is None:
        return _not_available(inspection, title, "heads")
    layers, heads = scores.induction.shape
    numbers = [("heads", f"{layers} layers with {heads} heads each")]
    for layer, head in scores.strongest()[:3]:
        values = f"previous {float(scores.previous_token[layer, head]):.2f}, induction {float(scores.induction[layer, head]):.2f}"
        kind = scores.kind(layer, head)
        numbers.append(
            (f"L{layer}H{head}", f"{values}: {'not yet characteristic' if kind is None else kind.replace('_', ' ') + ' head'}")
        )
    note = (
        "Heads learn different tasks. A previous-token head attends to the token before. An induction head finds an earlier copy "
        "of the current token and reads what followed it, so the model can continue repetitions."
    )
    return Step(title, note, numbers)


def _cross_attention(inspection: Inspection) -> Step:
    source = inspection.source
    assert source is not None
    numbers = [("source", " ".join(_quote(token.text) for token in source.tokens))]
    for token, weights in list(zip(inspection.tokens[1:], source.alignment, strict=False))[:_SHOWN]:
        best = weights.topk(min(3, len(weights)))
        reads = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        numbers.append((_quote(token.text), ", ".join(f"{_quote(source.tokens[key].text)} {share:.1%}" for key, share in reads)))
    note = (
        "A translation model has two parts. The encoder turns the source text into vectors. The decoder generates the translation. "
        "In each of its blocks, a second attention layer reads the encoder's vectors. The weights show which source tokens each "
        "predicted token depends on. The numbers are averages over the heads of the last block."
    )
    return Step("Cross-attention", note, numbers)


def _residual(inspection: Inspection) -> Step:
    title, cache = "Residual stream and norm", inspection.forward.cache
    if inspection.lens is None or "blocks.0.attn_out" not in cache:
        return _not_available(inspection, title, "lens")
    before, added, after = (cache[f"blocks.0.{name}"][0, -1] for name in ("resid_pre", "attn_out", "resid_post"))
    size = float(before.square().mean().sqrt())
    numbers = [
        ("length before layer 0", f"{float(before.norm()):.3f} (root mean square {size:.3f})"),
        ("attention adds", f"{float(added.norm()):.3f}"),
        ("length after layer 0", f"{float(after.norm()):.3f}"),
    ]
    note = (
        "A layer does not replace a token's vector but adds to it, so information survives many layers. Before a layer reads the "
        "vector, a norm scales it to a fixed size, so a growing sum does not affect the layer."
    )
    return Step(title, note, numbers)


def _feed_forward(inspection: Inspection) -> Step:
    title, network, cache = "Feed-forward", inspection.forward.network, inspection.forward.cache
    name = f"blocks.{network.depth - 1}.mlp.post"
    if name not in cache:
        return _not_available(inspection, title, "feed_forward")
    neurons = cache[name][0, -1]
    top = neurons.topk(min(_SHOWN, len(neurons)))
    numbers = [("neurons per layer", f"{len(neurons):,}")]
    numbers += [(f"neuron {id}", f"{value:.3f}") for id, value in zip(top.indices.tolist(), top.values.tolist(), strict=True)]
    note = (
        "After attention has collected information from other tokens, the feed-forward layer processes each token separately. Each "
        "neuron responds to one direction in the vector and adds another direction. The numbers are for the last token and layer."
    )
    return Step(
        title,
        note,
        numbers,
    )


def _blocks(inspection: Inspection) -> Step:
    title, lens = "Blocks", inspection.lens
    if lens is None:
        return _not_available(inspection, title, "lens")
    names = ["embeddings", *(f"after layer {layer}" for layer in range(len(lens.ids) - 1))]
    at = inspection.predicted_at
    guesses = zip(lens.ids[:, at, 0].tolist(), lens.probabilities[:, at, 0].tolist(), strict=True)
    numbers = [
        (name, f"{_quote(inspection.output_text(id))} {share:.1%}") for name, (id, share) in zip(names, guesses, strict=True)
    ]
    note = (
        "Attention and feed-forward layers form a block, and blocks are stacked. The logit lens shows what the model would predict "
        "if it stopped after each block. The prediction is refined from block to block."
    )
    return Step(title, note, numbers)


# From vectors to a token.


def _logits(inspection: Inspection) -> Step:
    top = inspection.forward.logits[0, inspection.predicted_at].topk(min(_SHOWN, inspection.forward.logits.shape[-1]))
    numbers = [
        (_quote(inspection.output_text(id)), f"logit {value:.3f}")
        for id, value in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]
    attributed = inspection.attributed
    if attributed is not None:
        largest = sorted(attributed.contributions, key=lambda item: -abs(item[1]))[:3]
        parts = ", ".join(f"{component} {value:+.3f}" for component, value in largest)
        numbers.append((f"contributions to {_quote(attributed.target)}", f"{parts}, ...; total {attributed.sum:.3f}"))
    output, place = _OUTPUTS[inspection.forward.task]
    note = (
        f"The last vector is compared with one vector for each {output}. Each dot product is a logit. "
        f"The higher the logit, the better it fits {place}."
    )
    return Step("Logits", note, numbers)


def _softmax(inspection: Inspection) -> Step:
    logits = inspection.forward.logits[0, inspection.predicted_at].double()
    total = float((logits - logits.max()).exp().sum())
    numbers = [("sum of e^(logit - largest)", f"{total:.4f}")]
    for id in logits.topk(min(_SHOWN, len(logits))).indices.tolist():
        power = math.exp(float(logits[id] - logits.max()))
        numbers.append((_quote(inspection.output_text(id)), f"{power:.4f} / {total:.4f} = {power / total:.2%}"))
    note = (
        "The softmax turns logits into probabilities: e to the power of each logit, divided by the sum over the vocabulary. "
        "Subtracting the largest logit first does not change the result and avoids large numbers."
    )
    return Step("Softmax", note, numbers)


def _sampling(inspection: Inspection, seed: int) -> Step:
    if inspection.labels is not None:
        return Step("A sampled token", "Not in this tour: a classifier does not sample. It returns the most likely label.", [])
    probabilities = inspection.forward.logits[0, inspection.predicted_at].double().softmax(-1).cpu()
    uniform = float(torch.rand((), generator=torch.Generator().manual_seed(seed)))
    ordered = probabilities.sort(descending=True)
    cumulative = ordered.values.cumsum(0)
    rank = min(int(torch.searchsorted(cumulative, torch.tensor(uniform, dtype=cumulative.dtype))), len(cumulative) - 1)
    before = float(cumulative[rank] - ordered.values[rank])
    chosen = _quote(inspection.token_text(int(ordered.indices[rank])))
    numbers = [
        ("random number", f"{uniform:.4f} (seed {seed})"),
        ("chosen", f"{chosen}, rank {rank + 1} by probability; it covers {before:.4f} to {float(cumulative[rank]):.4f}"),
    ]
    last = (
        "Replace the mask with this token."
        if inspection.forward.task == "masked_lm"
        else "Append this token to the text and repeat."
    )
    note = (
        "To generate text, draw a random number between 0 and 1, add up the probabilities from the most likely token down, and "
        f"stop at the token that reaches the number. {last}"
    )
    return Step("A sampled token", note, numbers)


# Learning.


def _loss(inspection: Inspection) -> Step:
    losses = [(token, token.loss) for token in inspection.tokens if token.loss is not None]
    if not losses:
        return _not_available(inspection, "The loss", "loss")
    numbers = [
        (_quote(token.text), f"p = {math.exp(-loss):.2%}, loss {loss:.3f} nats = {loss / math.log(2):.3f} bits")
        for token, loss in losses[:_SHOWN]
    ]
    mean = sum(loss for _, loss in losses) / len(losses)
    numbers.append(("mean", f"{mean:.4f} nats per token, like choosing among {math.exp(mean):,.1f} equally likely tokens"))
    note = (
        "A token's loss is the negative logarithm of the probability that the model assigned to it. The loss is 0 if the model was "
        "certain and large if it was surprised. Training lowers the mean loss over a large text."
    )
    return Step("The loss", note, numbers)


def _gradient_step(inspection: Inspection) -> Step:
    """Change the weight with the largest gradient by one step of gradient descent. The weight is restored afterwards."""
    title, network = "One gradient step", inspection.forward.network
    if inspection.forward.task != "causal_lm" or inspection.tokens[-1].loss is None:
        return Step(title, "Not in this tour: this step requires a model that predicts the next token.", [])
    tokens = inspection.forward.tokens
    name, weight, gradient = _largest_gradient(network, tokens)
    index = int(gradient.abs().argmax())
    slope, before = float(gradient.flatten()[index]), float(weight.detach().flatten()[index])
    with torch.no_grad():
        loss = float(_mean_loss(network, tokens))
        flat = weight.view(-1)
        flat[index] -= _LEARNING_RATE * slope
        after = float(flat[index])
        changed = float(_mean_loss(network, tokens))
        flat[index] = before
    place = ", ".join(str(int(i)) for i in torch.unravel_index(torch.tensor(index), weight.shape))
    numbers = [
        ("weight", f"{name}[{place}] = {before:.5f}"),
        ("gradient", f"{slope:+.5f}: the change in the loss per unit change in the weight"),
        ("new weight", f"{before:.5f} - {_LEARNING_RATE} × ({slope:.5f}) = {after:.5f}"),
        ("loss", f"{loss:.6f} -> {changed:.6f}: change {changed - loss:+.2e}, predicted {-_LEARNING_RATE * slope * slope:+.2e}"),
    ]
    note = (
        "The gradient shows how the loss responds to each weight. A step moves a weight against its gradient, by the learning rate "
        "times the gradient. Here, only the weight with the largest gradient moves. Training repeats this for all weights."
    )
    return Step(title, note, numbers)


def _largest_gradient(network: torch.nn.Module, tokens: Tensor) -> tuple[str, torch.nn.Parameter, Tensor]:
    parameters = {name: weight for name, weight in network.named_parameters() if weight.requires_grad and weight.is_contiguous()}
    with torch.enable_grad():
        gradients = torch.autograd.grad(_mean_loss(network, tokens), list(parameters.values()), allow_unused=True)
    found = {name: gradient for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None}
    name = max(found, key=lambda each: float(found[each].abs().max()))
    return name, parameters[name], found[name]


def _mean_loss(network: torch.nn.Module, tokens: Tensor) -> Tensor:
    return token_losses(network(tokens)[:, :-1], tokens[:, 1:]).mean()
