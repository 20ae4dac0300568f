"""Write the model card (README.md) for an exported Hugging Face folder: results, training data, and how to load the model."""

from __future__ import annotations

from pathlib import Path

from tinylm.data.split_text import PART_NAMES
from tinylm.errors import InputError
from tinylm.evaluation.evaluate_run import evaluate_run, measure_overlap
from tinylm.evaluation.metrics import Metrics
from tinylm.interchange import chat_files
from tinylm.interchange.generation_check import Snippet
from tinylm.interchange.huggingface import MODELING_FILE
from tinylm.recipe.mixture import describe_shares
from tinylm.recipe.schema import DataSection, HeldoutShare, HeldoutSources, TestShare, require_text
from tinylm.reporting import SILENT
from tinylm.run import Checkpoint, Run


def model_card(
    run: Run, checkpoint: Checkpoint, parameters: int, class_name: str, unsupported: tuple[str, ...], snippet: Snippet
) -> str:
    """Return the model card as Markdown.

    `unsupported` lists the model parts that no transformers class supports. If there are any, the export includes modeling code.
    """
    name = run.recipe.name
    front_matter = "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- tinylm\n- text-generation\n---\n"
    parts = [
        f"# {name}",
        f"A language model with {parameters:,} parameters, trained with tinylm for {checkpoint.step:,} steps and exported for "
        f"`{class_name}`. After the export, the model was loaded from this folder. Its logits and the text generated with the code "
        "below matched those of the original model.",
        "## Results",
        _results(run, checkpoint),
        "## Data",
        _data(run),
        "## Usage",
        _usage(name, snippet),
    ]
    if run.chat_encoder is not None:
        parts.append(chat_files.usage(name))
    if unsupported:
        parts.append(f"The folder includes `{MODELING_FILE}`, because no transformers class supports {', '.join(unsupported)}.")
    parts += ["## Recipe", f"```yaml\n{run.recipe.to_yaml()}```"]
    return front_matter + "\n\n".join(parts) + "\n"


def _results(run: Run, checkpoint: Checkpoint) -> str:
    """Return the results on the held-out text as logged during training, and on the test text if there is one."""
    evaluations = [line for line in run.metrics() if line["kind"] == "eval" and line["step"] == checkpoint.step]
    metrics = Metrics.from_dict(evaluations[-1]) if evaluations else None
    rows: list[tuple[str, Metrics]] = []
    if metrics is not None:
        rows.append(("held-out, used to choose the checkpoint", metrics))
    if run.has_test_split and run.chat_encoder is None:
        result = evaluate_run(run, split="test", checkpoint=checkpoint.name)
        rows.append(("test, never used during training", result.perplexity.metrics))
    if not rows:
        return "This checkpoint was not evaluated during training."
    columns = list(dict.fromkeys(metric for _, row in rows for metric, _ in row.items()))
    titles = [metric.label if metric.unit in ("", metric.label) else f"{metric.label} ({metric.unit})" for metric in columns]
    table = [f"| split | {' | '.join(titles)} |", f"|---|{'---|' * len(titles)}"]
    for name, row in rows:
        values = dict(row.items())
        cells = (metric.formatted(values[metric]) if metric in values else "" for metric in columns)
        table.append(f"| {name} | {' | '.join(cells)} |")
    if run.chat_encoder is not None:
        return "\n".join(table) + "\n\nOnly the answers in conversations are scored, including the end-of-turn tokens."
    return (
        "\n".join(table)
        + "\n\nEvery token is scored once, and documents are scored separately. Bits per byte does not depend on the tokenizer."
    )


def _data(run: Run) -> str:
    data = run.recipe.data
    sources = data.sources()["train"]
    if isinstance(data, DataSection) and sources[0].startswith("imported:"):
        return f"Imported from `{sources[0].removeprefix('imported:')}`. The training data is not recorded."
    trained = ", ".join(f"`{source}`" for source in sources)
    if isinstance(data, DataSection) and data.mixture:
        shares = describe_shares([item.model_copy(update={"source": (f"`{item.name}`",)}) for item in data.mixture])
        trained = f"a mixture: {', '.join(shares)}"
    lines = [f"Trained on {trained}."]
    pretrained = run.recipe.model.pretrained
    if pretrained is not None:
        lines.append(f"Training started from the weights of the run `{Path(pretrained.run).name}`{_pretraining_sources(run)}.")
    if isinstance(data, DataSection):
        lines += [_describe_split(run, split) for split in (("heldout", "test") if run.has_test_split else ("heldout",))]
    return "\n\n".join(line for line in lines if line)


def _pretraining_sources(run: Run) -> str:
    """Return a clause that lists the texts of earlier training runs, or an empty string if they are not recorded."""
    try:
        sources = [source for text in run.training_texts() if text.run is not None for source in text.sources]
    except InputError:
        sources = []
    return f", which was trained on {', '.join(f'`{source}`' for source in sources)}" if sources else ""


def _describe_split(run: Run, split: str) -> str:
    """Describe the source and size of the held-out or test text, and its overlap with each training text."""
    data = require_text(run.recipe.data)
    section = data.heldout if split == "heldout" else data.test
    assert section is not None
    source = ", ".join(section.sources) if isinstance(section, HeldoutSources) else _describe_share(data, split, section.share)
    name = PART_NAMES[split]
    try:
        shard = run.heldout(split)
    except InputError:
        return f"{name.capitalize()}: {source}."
    counts = shard.counts
    known = "; ".join(item.describe() for item in measure_overlap(run, shard, SILENT)) or "not known"
    return (
        f"{name.capitalize()}: {source} ({counts.documents:,} documents, {counts.bytes:,} bytes, {counts.tokens:,} tokens). "
        f"Overlap with the training text: {known}."
    )


def _describe_share(data: DataSection, split: str, share: float) -> str:
    """Describe which part of the text is the held-out or test text. The test text comes last, directly after the held-out text."""
    if isinstance(data.heldout, HeldoutShare) and data.heldout.by == "document":
        return f"{share:.0%} of the documents"
    if split == "heldout" and isinstance(data.test, TestShare):
        return f"the {share:.0%} of the text before the test text"
    return f"the last {share:.0%} of the text"


def _usage(name: str, snippet: Snippet) -> str:
    return (
        f"```python\n{snippet.code(name)}```\n\nReplace `{name}` with the path to this folder if the folder has a different name. "
        "During training, an end-of-text token preceded every document. If a text contains the characters `<|endoftext|>`, the "
        "tokenizer encodes them as ordinary text and not as the end-of-text token."
    )
