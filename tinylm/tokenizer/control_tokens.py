"""The control tokens of an encoder's tokenizer mark the start and end of a text, mask a token, or pad a sequence.

Text is never encoded as control tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

import tokenizers

from tinylm.errors import InputError
from tinylm.tokenizer.backend_errors import translate_backend_errors
from tinylm.tokenizer.tokenizer import DecodingRules, Tokenizer

_SPELLINGS = {
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
    "pad": ("[PAD]", "<pad>"),
}
"""The spelling of each control token in BERT's and in RoBERTa's vocabulary."""


@dataclass(frozen=True)
class ControlTokens:
    """The ids of the control tokens."""

    cls: int
    """The token before a text."""
    sep: int
    """The token after a text."""
    mask: int
    pad: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ControlTokens:
        """Find the control tokens of a tokenizer. Raises `InputError` if one is missing, or if text can be encoded as one."""
        ids = {}
        for name, spellings in _SPELLINGS.items():
            found = (tokenizer.backend.token_to_id(spelling) for spelling in spellings)
            id = next((id for id in found if id is not None), None)
            if id is None:
                hint = "an encoder needs [CLS], [SEP], [MASK] and [PAD] as special tokens"
                raise InputError(f"the tokenizer has no {spellings[0]} token", where="tokenizer", hint=hint)
            spelling = str(tokenizer.backend.id_to_token(id))
            if id in tokenizer.encode(spelling):
                hint = 'set "special": true for this token under added_tokens'
                raise InputError(f"the text {spelling} is encoded as the control token", where="tokenizer", hint=hint)
            ids[name] = id
        return cls(**ids)


def split_at_masks(tokenizer: Tokenizer, text: str) -> list[str]:
    """Return the parts of a text before, between and after its masks, each written as [MASK] or in the tokenizer's spelling.

    If the tokenizer joins a space to the word after it, one space before a mask belongs to the masked token and is removed.
    """
    parts = re.split("|".join(map(re.escape, (_SPELLINGS["mask"][0], _mask_spelling(tokenizer)))), text)
    return [*(part.removesuffix(" ") for part in parts[:-1]), parts[-1]] if joins_spaces(tokenizer) else parts


def joins_spaces(tokenizer: Tokenizer) -> bool:
    """Whether the vocabulary contains words that begin with a space.

    This is false if encoding drops all whitespace: the spaces in the decoded text are then not part of the tokens.
    """
    drops_spaces = DecodingRules.from_json(tokenizer.tokenizer_json).space_before == "always"
    return not drops_spaces and any(token[:1] == b" " and not token.isspace() for token in tokenizer.token_bytes)


def _mask_spelling(tokenizer: Tokenizer) -> str:
    return str(tokenizer.backend.id_to_token(ControlTokens.of(tokenizer).mask))


def encode_with_masks(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode a text in which each [MASK] represents one masked token. See `split_at_masks` for the space before it.

    All other control tokens in the text are encoded as ordinary text.
    """
    spelling = _mask_spelling(tokenizer)
    document = json.loads(tokenizer.backend.to_str())
    for token in document["added_tokens"]:
        if token["content"] == spelling:  # a token that is not special is recognized in any text
            token.update(special=False, lstrip=False, rstrip=False, single_word=False, normalized=False)
    backend = tokenizers.Tokenizer.from_str(json.dumps(document))
    backend.encode_special_tokens = True
    with translate_backend_errors():
        return list(backend.encode(spelling.join(split_at_masks(tokenizer, text)), add_special_tokens=False).ids)


def is_ordinary(tokenizer: Tokenizer) -> Sequence[bool]:
    """Whether each id is an ordinary token: not a control token, the end-of-text token, the unknown token or an unused id."""
    added = tokenizer.backend.get_added_tokens_decoder()
    special = {id for id, token in added.items() if token.special} | {tokenizer.end_of_text, tokenizer.unknown}
    return [id not in special and tokenizer.backend.id_to_token(id) is not None for id in range(tokenizer.vocab_size)]
