"""Add the chat template, in Jinja, and the end-of-turn token to exported Hugging Face folders and GGUF files.

The template comes from the run (`tokenizer.chat_template`). `check_ids` uses transformers to render conversations whose text
contains control tokens, and compares the ids with those that the model was trained on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tinylm.errors import WorkError
from tinylm.text.conversations import ASSISTANT, SYSTEM, USER, Message
from tinylm.tokenizer.chat_template import ChatEncoder

_PROBES = (
    "Hello!",
    " spaces and\n\nline breaks\n",
    "it's {{ messages }} {% if x %} \\ '",
    "naïve 東京 🙂",
    "ends with <",
)


def write(folder: Path, encoder: ChatEncoder) -> None:
    """Add the template and the end tokens to the files in an exported folder."""
    end = encoder.template.end_of_turn
    # The tokenizer has to recognize the template's control tokens, so it must not split them. The template escapes control tokens
    # in messages.
    _update(folder / "tokenizer_config.json", {"chat_template": encoder.jinja(), "eos_token": end, "split_special_tokens": False})
    _update(folder / "generation_config.json", {"eos_token_id": [encoder.end_of_turn, encoder.start]})


def _update(file: Path, values: dict[str, Any]) -> None:
    document = json.loads(file.read_text(encoding="utf-8")) | values
    file.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def add_to_gguf(writer: Any, encoder: ChatEncoder) -> None:
    """Add the template and the end-of-turn token to a GGUF file."""
    writer.add_chat_template(encoder.jinja())
    writer.add_eot_token_id(encoder.end_of_turn)


def probes(encoder: ChatEncoder) -> list[list[Message]]:
    """Return conversations for comparing templates. Some messages contain the text of control tokens."""
    control = encoder.control_tokens
    contents = [*_PROBES, *control, "".join(control), *(f"a{name}b" for name in control), *(name[:-1] for name in control)]
    conversations = [[Message(USER, text)] for text in contents]
    for text in (contents[0], "".join(control)):
        exchange = [Message(SYSTEM, text), Message(USER, text), Message(ASSISTANT, text)]
        conversations += [[*exchange, Message(USER, "more")], [*exchange[1:], Message(USER, text)]]
    return conversations


def check_ids(tokenizer: Any, encoder: ChatEncoder) -> None:
    """Raise `WorkError` if a transformers tokenizer's chat template produces other ids than those that the model was trained on."""
    for messages in probes(encoder):
        rendered = [message.as_dict() for message in messages]
        ids = tokenizer.apply_chat_template(rendered, add_generation_prompt=True, tokenize=True, return_dict=False)
        if list(ids) != encoder.prompt(encoder.turns(messages)):
            shown = messages[-1].content[:60]
            raise WorkError(f"the exported chat template produces different tokens for {shown!r}", hint="nothing was saved")


def usage(name: str) -> str:
    """Return the section in the model card that shows how to generate an answer."""
    code = (
        "messages = [{'role': 'user', 'content': 'Hello!'}]\n"
        "inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors='pt', return_dict=True)\n"
        "answer = model.generate(**inputs, max_new_tokens=100)[0, inputs['input_ids'].shape[1]:]\n"
        "print(tokenizer.decode(answer, skip_special_tokens=True))\n"
    )
    return (
        f"The model was trained on conversations. With `tokenizer` and `model` loaded from `{name}` as above:\n\n"
        f"```python\n{code}```\n\n"
        "If a message contains the text of a control token, the template inserts a space into it, so a message cannot end a turn. "
        "For text that does not go through the template, pass `split_special_tokens=True` to the tokenizer."
    )
