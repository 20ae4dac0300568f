"""A text as a model reads it: one HTML file that needs nothing else, each token shaded by how much it surprised.

The shades differ in lightness, one color from pale to dark, so that they are told apart without telling colors apart; the number is
always a pointer, a tap or a tab away, with what the model would rather have said.
"""

from __future__ import annotations

import html
import json
import math
from importlib import resources

from tinylm.evaluation.details import TokenLosses
from tinylm.tokenizer import Tokenizer

MOST_TOKENS = 20_000
"""What a page shows at most, from the text's beginning: more makes browsers slow."""
_NOTHING = "<i>\u00b7</i>"
"""Stands for a token that has no text of its own."""
_LEVELS = (1, 2, 4, 6, 8, 11, 14)
"""Bits of surprise at which the next shade begins."""


def page(losses: TokenLosses, tokenizer: Tokenizer, document: dict[str, object]) -> str:
    """The file's text. `document`: what `tinylm eval --json` says."""
    shard = losses.shard
    spans: list[str] = []
    told: list[list[object]] = []
    pending: list[int] = []
    shown = min(losses.detailed, len(shard))
    for place in range(1, shown):
        id = int(shard.tokens[place])
        if id == shard.end_of_text:
            spans.append('<hr title="end of a document">')
            continue
        nats = float(losses.nats[place])
        level = sum(nats / math.log(2) >= least for least in _LEVELS)
        pending.append(id)
        text = tokenizer.decode(pending)
        if (
            text.endswith("\ufffd") and len(pending) < 4 and tokenizer.token_bytes[id]
        ):  # half a character: shown with its other half
            text = ""
        else:
            pending = []
        inner = html.escape(text).replace("\n", "<i>\u21b5</i>\n")
        spans.append(f'<span class="t l{level}" data-i="{len(told)}">{inner or _NOTHING}</span>')
        others = [
            [tokenizer.decode([int(other)]), round(float(share), 4)]
            for other, share in zip(losses.alternatives[place], losses.probabilities[place], strict=True)
            if share > 0
        ]
        told.append([tokenizer.decode([id]), round(nats / math.log(2), 2), round(math.exp(-nats), 5), others])
    template = resources.files("tinylm.evaluation").joinpath("report.html").read_text(encoding="utf-8")
    more = len(shard) - shown
    facts = [
        (key.replace("_", " "), f"{value:.4f}" if isinstance(value, float) else f"{value}")
        for key, value in document.items()
        if key in ("run", "checkpoint", "text", "tokens", "bytes", "bits_per_byte", "perplexity", "context", "stride")
    ]
    return (
        template.replace(
            "{{FACTS}}", "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in facts)
        )
        .replace("{{MORE}}", f"<p>The first {shown:,} tokens; {more:,} more were measured.</p>" if more > 0 else "")
        .replace("{{DATA}}", json.dumps(told, ensure_ascii=False).replace("<", "\\u003c"))
        .replace("{{TEXT}}", "".join(spans))
    )
