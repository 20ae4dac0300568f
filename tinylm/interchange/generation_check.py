"""Check that transformers can generate text from an exported folder as shown in its model card.

`Snippet` is the code in the model card. `check_generation` makes the same calls, and also generates a batch with left padding and
uses beam search. It compares the log-probability of every generated token with that of the original network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tinylm.errors import WorkError
from tinylm.model.base import Model
from tinylm.tokenizer import Tokenizer

MAX_NEW_TOKENS = 40
_CHECKED_TOKENS = 12
"""Number of tokens to generate in the checks of batches and beam search."""
_NUM_BEAMS = 3
_MAX_DIFFERENCE = 1e-3
"""The largest difference between log-probabilities that float32 rounding can explain."""


@dataclass(frozen=True)
class Snippet:
    """The example in the model card. The prompt and the new tokens together fit into the context."""

    prompt: str
    new_tokens: int
    remote_code: bool

    @classmethod
    def choose(cls, tokenizer: Tokenizer, context_length: int, text: str, remote_code: bool) -> Snippet:
        """Use "Once" as the prompt if the tokenizer can encode it and it fits into half the context, else the start of `text`."""
        candidates = ["Once", *text.split()[:1], *text.strip()[:1]]
        for prompt in candidates:
            ids = tokenizer.encode(prompt)
            if ids and tokenizer.unknown not in ids and tokenizer.decode(ids) == prompt and 2 * len(ids) <= context_length:
                break
        else:
            prompt, ids = candidates[-1], tokenizer.encode(candidates[-1])
        return cls(prompt, max(1, min(MAX_NEW_TOKENS, context_length - len(ids))), remote_code)

    def code(self, folder: str) -> str:
        """Return Python code that loads the model from `folder` and prints a continuation."""
        trust = ", trust_remote_code=True" if self.remote_code else ""
        return (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f"tokenizer = AutoTokenizer.from_pretrained({folder!r}{trust})\n"
            f"model = AutoModelForCausalLM.from_pretrained({folder!r}{trust})\n"
            f'inputs = tokenizer({self.prompt!r}, return_tensors="pt")\n'
            f"print(tokenizer.decode(model.generate(**inputs, max_new_tokens={self.new_tokens})[0]))\n"
        )


def check_generation(model: Any, tokenizer: Any, network: Model, run_tokenizer: Tokenizer, snippet: Snippet, text: str) -> int:
    """Generate with the transformers `model` and `tokenizer`, and compare with `network`. Returns the number of compared tokens.

    Raises `WorkError` if `generate` fails or a log-probability differs.
    """
    prompts = [snippet.prompt, *_longer_prompt(snippet.prompt, run_tokenizer, network.model.context_length, text)]
    longest = max(len(run_tokenizer.encode(prompt)) for prompt in prompts)
    new_tokens = min(_CHECKED_TOKENS, network.model.context_length - longest)
    calls = [
        ("the code in the model card", prompts[:1], {"max_new_tokens": snippet.new_tokens}),
        ("a batch with left padding", prompts, {"max_new_tokens": new_tokens}),
        ("beam search", prompts, {"max_new_tokens": new_tokens, "num_beams": _NUM_BEAMS}),
    ]
    compared = 0
    for name, texts, options in calls:
        if options["max_new_tokens"] < 1:
            continue
        try:
            compared += _compare(model, tokenizer, network, texts, options, name)
        except WorkError:
            raise
        except Exception as error:  # any exception means that the export is unusable
            message = " ".join(str(error).split())[:300]
            raise WorkError(
                f"transformers cannot run {name} with the exported folder: {message}", hint="nothing was saved"
            ) from error
    return compared


def _longer_prompt(prompt: str, tokenizer: Tokenizer, context_length: int, text: str) -> list[str]:
    """Return a prompt from `text` with more tokens than `prompt` that leaves room to generate, or [] if there is none."""
    start = text.strip()[:200]
    for length in range(len(start), 0, -5):
        candidate = start[:length]
        if len(tokenizer.encode(prompt)) < len(tokenizer.encode(candidate)) <= max(1, context_length // 2):
            return [candidate]
    return []


@torch.no_grad()
def _compare(model: Any, tokenizer: Any, network: Model, texts: Sequence[str], options: dict[str, Any], name: str) -> int:
    """Call the tokenizer and `generate` once, and compare all generated tokens up to the end-of-text token.

    Returns the number of compared tokens. Raises `WorkError` if a log-probability differs.
    """
    padding = {"padding": True} if len(texts) > 1 else {}
    inputs = tokenizer(list(texts) if len(texts) > 1 else texts[0], return_tensors="pt", **padding)
    output = model.generate(**inputs, **options, output_scores=True, return_dict_in_generate=True)
    prompt_length = inputs["input_ids"].shape[1]
    beams = getattr(output, "beam_indices", None)
    theirs = model.compute_transition_scores(output.sequences, output.scores, beams, normalize_logits=beams is None)  # (B, new)
    compared = 0
    for row in range(len(texts)):
        prompt = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        generated = _until_end(output.sequences[row, prompt_length:], model.generation_config.eos_token_id)
        ours = _log_probabilities(network, prompt, generated)
        difference = float((ours - theirs[row, : len(generated)]).abs().max())
        if not difference <= _MAX_DIFFERENCE:
            raise WorkError(
                f"with {name}, the exported folder generates different text than the run: "
                f"log-probabilities differ by {difference:.2e}",
                hint="nothing was saved",
            )
        compared += len(generated)
    return compared


def _until_end(ids: Tensor, end: int | list[int] | None) -> Tensor:
    """Return the ids up to and including the first end token. Padding after this token is removed."""
    ends = torch.isin(ids, torch.tensor(end)).nonzero() if end is not None else torch.empty(0)
    return ids[: int(ends[0]) + 1] if len(ends) else ids


def _log_probabilities(network: Model, prompt: Tensor, generated: Tensor) -> Tensor:
    """Return the log-probability of each generated id (new,), given the ids before it."""
    ids = torch.cat((prompt, generated))[None]
    logits = network(ids[:, :-1])[0, len(prompt) - 1 :]
    chosen: Tensor = logits.float().log_softmax(-1).gather(-1, generated[:, None])[:, 0]
    return chosen
