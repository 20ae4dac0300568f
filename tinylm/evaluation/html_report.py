"""Render an evaluated text as one self-contained HTML file in which each token is shaded by its loss.

All shades have the same hue and differ only in lightness, so they do not depend on color vision. Hovering over a token, tapping it
or moving to it with the arrow keys shows its exact loss and the tokens that the model considered most likely.
"""

from __future__ import annotations

import html
import json
import math
from importlib import resources

from tinylm.evaluation.breakdown import TokenLosses
from tinylm.tokenizer import Tokenizer

MAX_TOKENS = 20_000
"""The page shows at most this many tokens from the beginning of the text, because more tokens would slow down browsers."""
_EMPTY_TOKEN = "<i>\u00b7</i>"
"""The page shows this for a token without text."""
_LEVELS = (1, 2, 4, 6, 8, 11, 14)
"""The lowest loss for each shade, in bits."""
_FACTS = ("run", "checkpoint", "text", "tokens", "bytes", "bits_per_byte", "perplexity", "context", "stride")


def render(losses: TokenLosses, tokenizer: Tokenizer, document: dict[str, object]) -> str:
    """Return the content of the HTML file. `document` is the output of `tinylm eval --json`."""
    spans, data = _render_tokens(losses, tokenizer)
    shown = min(losses.detailed, len(losses.shard))
    hidden = len(losses.shard) - shown
    facts = [
        (
            key.replace("_", " "),
            f"{value:,.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else f"{value}",
        )
        for key, value in document.items()
        if key in _FACTS
    ]
    template = resources.files("tinylm.evaluation").joinpath("html_report.html").read_text(encoding="utf-8")
    return (
        template.replace(
            "{{FACTS}}", "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in facts)
        )
        .replace("{{MORE}}", f"<p>Showing the first {shown:,} tokens; {hidden:,} more were evaluated.</p>" if hidden > 0 else "")
        .replace("{{DATA}}", json.dumps(data, ensure_ascii=False).replace("<", "\\u003c"))
        .replace("{{TEXT}}", "".join(spans))
    )


def _render_tokens(losses: TokenLosses, tokenizer: Tokenizer) -> tuple[list[str], list[list[object]]]:
    """Return, for each token, its HTML and the data for the script: token, bits, probability, [[alternative, probability], ...]."""
    shard = losses.shard
    spans: list[str] = []
    data: list[list[object]] = []
    pending: list[int] = []  # tokens of a character that is still incomplete
    for position in range(1, min(losses.detailed, len(shard))):
        id = int(shard.tokens[position])
        if id == shard.end_of_text:
            spans.append('<hr title="end of a document">')
            continue
        nats = float(losses.nats[position])
        level = sum(nats / math.log(2) >= bound for bound in _LEVELS)
        pending.append(id)
        text = tokenizer.decode(pending)
        if text.endswith("\ufffd") and len(pending) < 4 and tokenizer.token_bytes[id]:
            text = ""  # a character that spans several tokens is shown at its last token
        else:
            pending = []
        inner = html.escape(text).replace("\n", "<i>\u21b5</i>\n")
        spans.append(f'<span class="t l{level}" data-i="{len(data)}">{inner or _EMPTY_TOKEN}</span>')
        alternatives = [
            [tokenizer.decode([int(other)]), round(float(probability), 4)]
            for other, probability in zip(losses.alternatives[position], losses.probabilities[position], strict=True)
            if probability > 0
        ]
        data.append([tokenizer.decode([id]), round(nats / math.log(2), 2), round(math.exp(-nats), 5), alternatives])
    return spans, data
