"""The model card (README.md) of an exported Hugging Face folder: training data, held-out results, and how to load the model."""

from __future__ import annotations

from tinylm.errors import InputError
from tinylm.evaluation.metrics import Metrics
from tinylm.interchange.huggingface import MODELING_FILE
from tinylm.recipe.schema import HeldoutShare
from tinylm.run import Checkpoint, Run


def model_card(run: Run, checkpoint: Checkpoint, parameters: int, class_name: str, unsupported: tuple[str, ...]) -> str:
    """Return the model card as Markdown.

    `unsupported`: the model parts that no transformers class supports. If there are any, the export includes modeling code.
    """
    name = run.recipe.name
    front_matter = "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- tinylm\n- text-generation\n---\n"
    parts = [
        f"# {name}",
        f"A language model with {parameters:,} parameters, trained with tinylm for {checkpoint.step:,} steps and exported for "
        f"`{class_name}`. After the export, the model was loaded from this folder and its logits matched the original.",
        "## Held-out results",
        _heldout_results(run, checkpoint),
        "## Data",
        _data(run),
        "## Usage",
        _usage(name, bool(unsupported)),
    ]
    if unsupported:
        parts.append(f"The folder includes `{MODELING_FILE}`, because no transformers class supports {', '.join(unsupported)}.")
    parts += ["## Recipe", f"```yaml\n{run.recipe.to_yaml()}```"]
    return front_matter + "\n\n".join(parts) + "\n"


def _heldout_results(run: Run, checkpoint: Checkpoint) -> str:
    evaluations = [line for line in run.metrics() if line["kind"] == "eval" and line["step"] == checkpoint.step]
    metrics = Metrics.from_dict(evaluations[-1]) if evaluations else None
    if metrics is None:
        return "This checkpoint was not evaluated during training."
    measured = metrics.items()
    units = {metric: metric.unit for metric, _ in measured if metric.unit != metric.label}
    titles = [f"{metric.label} ({units[metric]})" if units.get(metric) else metric.label for metric, _ in measured]
    values = [metric.formatted(value) for metric, value in measured]
    return (
        f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}\n| {' | '.join(values)} |\n\n"
        "Every held-out token is scored once, and documents are scored separately. Bits per byte do not depend on the tokenizer."
    )


def _data(run: Run) -> str:
    data = run.recipe.data
    if data.train[0].startswith("imported:"):
        return f"Imported from `{data.train[0].removeprefix('imported:')}`. The training data is not recorded."
    heldout = data.heldout
    split = f"{heldout.share:.0%} by {heldout.by}" if isinstance(heldout, HeldoutShare) else ", ".join(heldout.sources)
    text = f"Trained on {', '.join(f'`{source}`' for source in data.train)}. Held out from training: {split}"
    try:
        counts = run.heldout().counts
    except InputError:
        return f"{text}."
    return f"{text} ({counts.documents:,} documents, {counts.bytes:,} bytes, {counts.tokens:,} tokens)."


def _usage(name: str, needs_remote_code: bool) -> str:
    trust = ", trust_remote_code=True" if needs_remote_code else ""
    return (
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{name}"{trust})\n'
        f'model = AutoModelForCausalLM.from_pretrained("{name}"{trust})\n'
        'ids = tokenizer("Once", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**ids, max_new_tokens=40)[0]))\n```\n\n"
        "In training, an end-of-text token preceded every document. The tokenizer treats the characters `<|endoftext|>` "
        "in a text as plain text."
    )
