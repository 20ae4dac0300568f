"""The model card of an exported folder: what it is, what it learned from, how it was measured, how to load it."""

from __future__ import annotations

from typing import Any

from tinylm.errors import InputError
from tinylm.interchange.huggingface import MODELING
from tinylm.recipe.schema import HeldoutShare
from tinylm.run import Checkpoint, Run


def model_card(run: Run, checkpoint: Checkpoint, parameters: int, class_name: str, lacking: tuple[str, ...]) -> str:
    """README.md in Markdown, with the recipe, the data's description and the held-out numbers."""
    name = run.recipe.name
    front = "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- tinylm\n- text-generation\n---\n"
    parts = [
        f"# {name}",
        f"A language model of {parameters:,} parameters, trained with tinylm for {checkpoint.step:,} steps and exported for "
        f"`{class_name}`. The export was loaded again and has the logits of the original.",
        "## Held-out numbers",
        _numbers(run, checkpoint),
        "## Data",
        _data(run),
        "## Use",
        _use(name, bool(lacking)),
    ]
    if lacking:
        parts.append(f"The folder carries `{MODELING}`, because no class of transformers has {', '.join(lacking)}.")
    parts += ["## Recipe", f"```yaml\n{run.recipe.to_yaml()}```"]
    return front + "\n\n".join(parts) + "\n"


def _numbers(run: Run, checkpoint: Checkpoint) -> str:
    measured = [line for line in run.metrics() if line["kind"] == "eval" and line["step"] == checkpoint.step]
    if not measured:
        return "Not measured at this step."
    line: dict[str, Any] = measured[-1]
    return (
        f"| loss (nats per token) | bits per byte |\n|---|---|\n| {line['val_loss']:.4f} | {line['val_bits_per_byte']:.4f} |\n\n"
        "Every held-out token scored once, each document by itself; bits per byte do not depend on the tokenizer."
    )


def _data(run: Run) -> str:
    data = run.recipe.data
    if data.train[0].startswith("imported:"):
        return f"Imported from `{data.train[0].removeprefix('imported:')}`; what it learned from is not known here."
    heldout = data.heldout
    how = f"{heldout.share:.0%} by {heldout.by}" if isinstance(heldout, HeldoutShare) else ", ".join(heldout.sources)
    text = f"Trained on {', '.join(f'`{source}`' for source in data.train)}; held out and never trained on: {how}"
    try:
        counts = run.heldout().counts
    except InputError:
        return f"{text}."
    return f"{text} ({counts.documents:,} documents, {counts.bytes:,} bytes, {counts.tokens:,} tokens)."


def _use(name: str, own_code: bool) -> str:
    trust = ", trust_remote_code=True" if own_code else ""
    return (
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{name}"{trust})\n'
        f'model = AutoModelForCausalLM.from_pretrained("{name}"{trust})\n'
        'ids = tokenizer("Once", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**ids, max_new_tokens=40)[0]))\n```\n\n"
        "A document begins after the end-of-text token; text that spells it is text."
    )
