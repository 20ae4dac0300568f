"""Render an inspection as one HTML file that works offline. Data, styles and scripts are embedded in the file."""

from __future__ import annotations

import html
import json
from dataclasses import dataclass
from typing import Any

import tinylm
from tinylm.errors import InputError
from tinylm.inspection import effects, page_data
from tinylm.inspection.formulas import formulas
from tinylm.inspection.heldout import HeldoutWindows, heldout_windows
from tinylm.inspection.learning import CheckpointView
from tinylm.inspection.overview import Inspection
from tinylm.inspection.templates import fill, read
from tinylm.reporting import SILENT, Reporter
from tinylm.text.sources import describe

_SCRIPTS = ("page_core.js", "page_parts.js", "page_predictions.js", "page_effects.js")


@dataclass(frozen=True)
class PageOptions:
    """What the page shows in addition to the text itself."""

    corrupt: str | None = None
    """A text with the same number of tokens, for activation patching."""
    sources: tuple[str, ...] = ()
    """Texts for ablations and neurons. The default is the run's held-out text."""
    ablation_tokens: int | None = None
    """Number of tokens for measuring ablations. The default is chosen to take a few seconds. 0 disables ablations."""


def render(
    inspection: Inspection,
    views: list[CheckpointView],
    options: PageOptions = PageOptions(),
    reporter: Reporter = SILENT,
) -> str:
    """Return the HTML of the page.

    Raises `InputError` if `options.corrupt` has a different number of tokens, or a source cannot be read.
    """
    data = collect(inspection, views, options, reporter)
    content = {
        "TITLE": html.escape(f"{inspection.run.name} {inspection.checkpoint.name}"),
        "STYLE": read("page.css"),
        "SCRIPT": "\n".join(read(name) for name in _SCRIPTS),
        "DATA": json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c"),
    }
    return fill(read("page.html"), content)


def collect(inspection: Inspection, views: list[CheckpointView], options: PageOptions, reporter: Reporter) -> dict[str, Any]:
    """Return everything that the page shows as JSON values."""
    network = inspection.forward.network
    measured = _measured_text(inspection, options, reporter)
    active = page_data.active_neurons(inspection)
    parts = {
        "tokens": page_data.tokens(inspection),
        "embeddings": page_data.embeddings(inspection),
        "attention": page_data.attention(inspection),
        "source": page_data.source(inspection),
        "residual": page_data.residual(inspection),
        "neurons": effects.neurons(inspection, active, measured),
        "lens": page_data.lens(inspection),
        "attribution": page_data.attributions(inspection),
        "sampling": page_data.sampling(inspection),
        "ablation": effects.ablations(inspection, measured, options.ablation_tokens, reporter),
        "patching": effects.patching(inspection, options.corrupt, reporter),
        "learning": effects.learning(views),
    }
    return {
        **parts,
        "run": str(inspection.run.path),
        "checkpoint": inspection.checkpoint.name,
        "version": tinylm.__version__,
        "architecture": inspection.forward.model.architecture,
        "task": inspection.forward.task,
        "causal": network.is_causal,
        "labels": inspection.labels,
        "parameters": inspection.forward.model.parameter_count(),
        "measured_on": describe(options.sources) if options.sources else "the run's held-out text",
        "missing": inspection.missing,
        "formulas": formulas(inspection.forward.model.model),
        "vocabulary": _vocabulary(inspection, parts),
    }


def _measured_text(inspection: Inspection, options: PageOptions, reporter: Reporter) -> HeldoutWindows | None:
    """Return the text for ablations and neurons.

    Returns None for a run without held-out text, such as an imported run, if there are no sources. The page then shows the reason.
    """
    if inspection.forward.task == "translation":
        inspection.missing["heldout"] = "neurons of translation models are not shown on held-out text"
        return None
    wanted = max(effects.NEURON_TOKENS, options.ablation_tokens or effects.ablation_tokens(inspection.forward.network))
    try:
        return heldout_windows(inspection.run, wanted, options.sources, reporter)
    except InputError as error:
        if options.sources:
            raise
        inspection.missing["heldout"] = f"{error.message}; specify a text with --on"
        return None


def _vocabulary(inspection: Inspection, parts: dict[str, Any]) -> dict[int, str]:
    """Return the texts of all token ids on the page."""
    ids = {token.id for token in inspection.tokens}
    if inspection.labels is None:
        ids |= set(parts["sampling"]["ids"])
        ids |= set() if inspection.lens is None else set(inspection.lens.ids.flatten().tolist())
    if parts["embeddings"] is not None:
        ids |= {other for row in parts["embeddings"]["nearest"].values() for other, _ in row}
    if parts["attribution"] is not None and inspection.labels is None:
        ids |= {*parts["attribution"]["targets"], *parts["attribution"]["competitors"]}
    if parts["neurons"] is not None and parts["neurons"]["snippets"] is not None:
        ids |= {id for window in parts["neurons"]["snippets"]["windows"] for id in window}
    return {id: inspection.token_text(id) for id in sorted(ids)}
