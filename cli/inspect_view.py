"""The terminal view of `tinylm inspect`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tinylm.tokenizer.explain import visible

from .console import stdout_console

if TYPE_CHECKING:
    from tinylm.inspection.heads import HeadScores
    from tinylm.inspection.learning import CheckpointView
    from tinylm.inspection.lens import LensGuesses
    from tinylm.inspection.overview import Inspection, SourceText, Token

_SHADES = ("", "underline", "bold", "bold reverse")
"""Token styles, from low to high surprise. They do not rely on color."""
_BOUNDS = (2, 6, 11)
"""For each style after the first one, the lowest surprise in bits."""
_LENS_WIDTH = 12
_LENS_COLUMNS = 8
_HEADS = 3
_CONTRIBUTIONS = 8
_ALIGNED = 3
_BAR = 20
_KINDS = {"previous_token": "previous token", "duplicate_token": "duplicate token", "induction": "induction"}


def print_inspection(result: Inspection, views: list[CheckpointView]) -> None:
    """Print the tokens with their surprise, the logit lens, the characteristic heads and the last prediction."""
    console = stdout_console()
    console.print(Text(f"{result.run.path} {result.checkpoint.name}", style="bold"))
    _print_tokens(console, result)
    _print_lens(console, result)
    _print_heads(console, result)
    if result.source is not None and len(result.tokens) > 1:
        _print_alignment(console, result, result.source)
    _print_prediction(console, result)
    if views:
        _print_checkpoints(console, views)
    for part, reason in result.missing.items():
        console.print(Text(f"{part}: not available, because {reason}", style="dim"))


def _print_tokens(console: Console, result: Inspection) -> None:
    console.print()
    if result.source is not None:
        console.print(Text("source  " + _bracketed(result.source.tokens)), soft_wrap=not console.is_terminal)
    line = Text("tokens  ")
    for index, token in enumerate(result.tokens):
        bits = 0.0 if token.loss is None else token.loss / math.log(2)
        line.append(" " if index else "")
        line.append(f"[{visible(token.text)}]", style=_SHADES[sum(bits >= bound for bound in _BOUNDS)])
    console.print(line, soft_wrap=not console.is_terminal)
    losses = [token.loss for token in result.tokens if token.loss is not None]
    if not losses:
        return
    hardest = sorted((token for token in result.tokens if token.loss is not None), key=lambda token: -(token.loss or 0.0))[:3]
    named = ", ".join(f"[{visible(token.text)}] {(token.loss or 0.0) / math.log(2):.1f}" for token in hardest)
    mean = sum(losses) / len(losses)
    bounds = f"underlined from {_BOUNDS[0]} bits, bold from {_BOUNDS[1]}, reversed from {_BOUNDS[2]}"
    console.print(Text(f"surprise  {mean:.3f} nats = {mean / math.log(2):.3f} bits per token ({bounds}); most: {named}"))


def _print_lens(console: Console, result: Inspection) -> None:
    if result.lens is None:
        return
    if result.labels is not None:
        _print_label_lens(console, result, result.lens, result.labels)
        return
    ids, shares = result.lens.ids.tolist(), result.lens.probabilities.tolist()
    first = max(0, len(result.tokens) - _LENS_COLUMNS) if console.is_terminal else 0
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), title=" ")
    table.add_column("logit lens")
    for token in result.tokens[first:]:
        table.add_column(Text(_short(token.text)))
    names = ["embeddings", *(f"layer {layer}" for layer in range(len(ids) - 1))]
    for name, layer_ids, layer_shares in reversed(list(zip(names, ids, shares, strict=True))):
        cells = [
            Text(f"{_short(result.token_text(guesses[0]))} {probabilities[0]:.0%}")
            for guesses, probabilities in zip(layer_ids[first:], layer_shares[first:], strict=True)
        ]
        table.add_row(name, *cells)
    console.print(table)
    if first:
        console.print(Text(f"the last {_LENS_COLUMNS} of {len(result.tokens)} positions; --json and --out show all", style="dim"))


def _print_label_lens(console: Console, result: Inspection, lens: LensGuesses, labels: list[str]) -> None:
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), title=" ")
    table.add_column("logit lens")
    shown = [id for id, _ in result.next_tokens[:_LENS_COLUMNS]]
    for id in shown:
        table.add_column(Text(_short(labels[id])), justify="right")
    for layer in reversed(range(len(lens.ids))):
        shares = dict(zip(lens.ids[layer, 0].tolist(), lens.probabilities[layer, 0].tolist(), strict=True))
        table.add_row("embeddings" if layer == 0 else f"layer {layer - 1}", *(f"{shares[id]:.1%}" for id in shown))
    console.print(table)


def _print_heads(console: Console, result: Inspection) -> None:
    if result.source is not None:
        _print_scores(console, "encoder", result.source.heads)
    if result.heads is not None:
        _print_scores(console, "heads" if result.source is None else "decoder", result.heads)


def _print_scores(console: Console, title: str, heads: HeadScores) -> None:
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), title=" ")
    for name in (title, *_KINDS.values(), "entropy"):
        table.add_column(name, justify="left" if name == title else "right")
    table.add_column("kind")
    for layer, head in heads.strongest()[:_HEADS]:
        kind = heads.kind(layer, head)
        scores = [f"{float(heads.of(name)[layer, head]):.2f}" for name in _KINDS]
        entropy = f"{float(heads.entropy[layer, head]):.1f} bits"
        table.add_row(f"L{layer}H{head}", *scores, entropy, "not yet characteristic" if kind is None else f"{_KINDS[kind]} head")
    console.print(table)


def _print_alignment(console: Console, result: Inspection, source: SourceText) -> None:
    """Print the source tokens that each predicted token depends on most."""
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), title=" ")
    table.add_column("alignment")
    for name in ("source tokens with the largest cross-attention", ""):
        table.add_column(name)
    predicted = [token.text for token in result.tokens[1:]]
    for text, weights in zip(predicted, source.alignment, strict=False):
        best = weights.topk(min(_ALIGNED, len(weights)))
        cells = [
            f"[{visible(source.tokens[index].text)}] {share:.0%}"
            for index, share in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
        bar = "█" * round(_BAR * float(best.values[0]))
        table.add_row(Text(f"[{visible(text)}]"), Text(", ".join(cells)), bar)
    console.print(table)


def _print_prediction(console: Console, result: Inspection) -> None:
    guesses = ", ".join(f"[{visible(result.output_text(id))}] {share:.1%}" for id, share in result.next_tokens[:5])
    console.print()
    preposition = "at" if result.forward.task == "masked_lm" else "after"
    place = {
        "causal_lm": "after the text",
        "classification": "label",
        "translation": f"after token {result.predicted_at}",
        "masked_lm": f"at token {result.predicted_at}",
    }[result.forward.task]
    console.print(Text(f"{place}  {guesses}"), soft_wrap=not console.is_terminal)
    attributed = result.attributed
    if attributed is None:
        return
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), title=" ")
    table.add_column("contribution", justify="right")
    where = "" if result.labels is not None else f" {preposition} token {attributed.position}"
    table.add_column(Text(f"to the logit of [{visible(attributed.target)}]{where}"))
    ordered = sorted(attributed.contributions, key=lambda item: -abs(item[1]))
    for component, logit in ordered[:_CONTRIBUTIONS]:
        table.add_row(f"{logit:+.3f}", component)
    rest = sum(logit for _, logit in ordered[_CONTRIBUTIONS:])
    if len(ordered) > _CONTRIBUTIONS:
        table.add_row(
            f"{rest:+.3f}", f"{len(ordered) - _CONTRIBUTIONS} {'other' if len(ordered) == _CONTRIBUTIONS + 1 else 'others'}"
        )
    table.add_row(
        f"{attributed.sum:+.3f}", f"sum; the logit is {attributed.logit:+.3f} (remainder {attributed.logit - attributed.sum:+.1e})"
    )
    console.print(table)


def _print_checkpoints(console: Console, views: list[CheckpointView]) -> None:
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), title=" ")
    for name in ("step", "loss", *(f"best {name}" for name in _KINDS.values())):
        table.add_column(name, justify="right")
    for view in views:
        loss = "" if view.mean_loss is None else f"{view.mean_loss:.3f}"
        best = ["" if view.heads is None else f"{float(view.heads.of(kind).max()):.2f}" for kind in _KINDS]
        table.add_row(f"{view.step:,}", loss, *best)
    console.print(table)


def _bracketed(tokens: list[Token]) -> str:
    return " ".join(f"[{visible(token.text)}]" for token in tokens)


def _short(text: str) -> str:
    shown = visible(text)
    return shown if len(shown) <= _LENS_WIDTH else shown[: _LENS_WIDTH - 1] + "…"
