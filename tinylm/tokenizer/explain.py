"""Explain step by step how a text is encoded: the merges of BPE, the best segmentations of Unigram, the matches of WordPiece."""

from __future__ import annotations

import html
import itertools
import math
import re
from dataclasses import dataclass
from importlib import resources

from tinylm.errors import InputError
from tinylm.tokenizer.byte_level import unicode_to_bytes
from tinylm.tokenizer.tokenizer import BYTE_TOKENS, Tokenizer

MAX_CHARACTERS = 20_000
_N_ALTERNATIVES = 3
"""Number of Unigram segmentations to show in addition to the best one."""


@dataclass(frozen=True)
class Token:
    """A token of the text."""

    id: int
    text: str
    """Bytes of incomplete characters are written as \\xNN."""
    score: float | None = None
    """The log probability, for Unigram only."""


@dataclass(frozen=True)
class Step:
    """One step in encoding a word: a description, and the parts of the word after the step."""

    description: str
    parts: list[str]


@dataclass(frozen=True)
class Word:
    """A part of the text that the pretokenizer splits off and the model encodes separately."""

    text: str
    tokens: list[Token]
    steps: list[Step]


@dataclass(frozen=True)
class Explanation:
    """The words of a text in order. Whitespace that the pretokenizer drops is not part of any word."""

    kind: str
    text: str
    normalized: str
    words: list[Word]

    @property
    def tokens(self) -> list[Token]:
        return [token for word in self.words for token in word.tokens]


def explain(tokenizer: Tokenizer, text: str) -> Explanation:
    """Explain the encoding of a text of at most `MAX_CHARACTERS` characters. The tokens are the same as with `tokenizer.encode`.

    Raises `InputError` for a longer text or a tokenizer that is not supported.
    """
    if len(text) > MAX_CHARACTERS:
        raise InputError(f"the text has {len(text):,} characters, but at most {MAX_CHARACTERS:,} can be explained", where="TEXT")
    backend = tokenizer.backend
    normalized = backend.normalizer.normalize_str(text) if backend.normalizer is not None else text
    explainer = _WordExplainer(tokenizer)
    words = []
    for part, is_added in _split_at_added_tokens(tokenizer, normalized):
        if is_added:
            id = backend.token_to_id(part)
            assert id is not None
            words.append(Word(part, [Token(id, part)], [Step("added token", [part])]))
        else:
            split = backend.pre_tokenizer.pre_tokenize_str(part) if backend.pre_tokenizer is not None else [(part, None)]
            words += [explainer.explain(word) for word, _ in split if word]
    explanation = Explanation(tokenizer.kind, text, normalized, words)
    if [token.id for token in explanation.tokens] != tokenizer.encode(text):
        raise InputError(
            "cannot explain this tokenizer", hint="post-processors and added tokens in normalized text are not supported"
        )
    return explanation


def _split_at_added_tokens(tokenizer: Tokenizer, text: str) -> list[tuple[str, bool]]:
    """Split a text into (part, whether it is an added token). The leftmost match wins, then the longest."""
    added = sorted((str(t.content) for t in tokenizer.backend.get_added_tokens_decoder().values() if not t.special), key=len)
    parts: list[tuple[str, bool]] = []
    while text:
        start, token = min(
            ((text.find(token), token) for token in reversed(added) if token in text),
            default=(-1, ""),
            key=lambda match: match[0],
        )
        if start < 0:
            parts.append((text, False))
            break
        if start > 0:
            parts.append((text[:start], False))
        parts.append((token, True))
        text = text[start + len(token) :]
    return parts


class _WordExplainer:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._model = tokenizer.tokenizer_json["model"]

    def explain(self, word: str) -> Word:
        tokens = [
            Token(token.id, self._text_of_id(token.id), self._score(token.id))
            for token in self._tokenizer.backend.model.tokenize(word)
        ]
        explainers = {"BPE": self._bpe, "Unigram": self._unigram, "WordPiece": self._wordpiece}
        steps = explainers.get(self._model["type"], self._lookup)(word, tokens)
        return Word(self._text(word), tokens, steps)

    def _score(self, id: int) -> float | None:
        return self._model["vocab"][id][1] if self._model["type"] == "Unigram" else None

    def _text_of_id(self, id: int) -> str:
        token = self._tokenizer.backend.id_to_token(id) or ""
        return token if token in BYTE_TOKENS or id == self._tokenizer.unknown else self._text(token)

    def _text(self, token: str) -> str:
        """Return the readable text of a token or pretokenized word. Bytes of incomplete characters are written as \\xNN."""
        table = unicode_to_bytes()
        if not self._tokenizer.is_byte_level or not all(character in table for character in token):
            return token
        return bytes(table[character] for character in token).decode("utf-8", "backslashreplace")

    def _bpe(self, word: str, tokens: list[Token]) -> list[Step]:
        ranks = self._tokenizer.merge_ranks
        parts = list(word)
        steps = [Step("bytes" if self._tokenizer.is_byte_level else "characters", [self._text(part) for part in parts])]
        while candidates := [(ranks[pair], index) for index, pair in enumerate(itertools.pairwise(parts)) if pair in ranks]:
            rank, index = min(candidates)
            left, right = parts[index : index + 2]
            parts[index : index + 2] = [left + right]
            description = f"merge {rank + 1:,}: {self._text(left)!r} + {self._text(right)!r}"
            steps.append(Step(description, [self._text(part) for part in parts]))
        texts = [token.text for token in tokens]
        if texts != steps[-1].parts:
            steps.append(Step("characters outside the alphabet", texts))
        return steps

    def _unigram(self, word: str, tokens: list[Token]) -> list[Step]:
        scores = dict(self._model["vocab"])
        total = sum(token.score or 0.0 for token in tokens)
        texts = [token.text for token in tokens]
        steps = [Step(f"best segmentation: log p = {total:.2f}", texts)]
        others = [(score, path) for score, path in _best_paths(word, scores, _N_ALTERNATIVES + 1) if path != texts]
        return steps + [Step(f"alternative: log p = {score:.2f}", path) for score, path in others[:_N_ALTERNATIVES]]

    def _wordpiece(self, word: str, tokens: list[Token]) -> list[Step]:
        if [token.id for token in tokens] == [self._tokenizer.unknown]:
            return [Step("no match: the word is unknown", [tokens[0].text])]
        texts = [token.text for token in tokens]
        return [
            Step(f"longest match: {text!r}", [*texts[:count], *(["..."] if count < len(texts) else [])])
            for count, text in enumerate(texts, 1)
        ]

    def _lookup(self, word: str, tokens: list[Token]) -> list[Step]:
        known = [token.id for token in tokens] != [self._tokenizer.unknown]
        return [Step("in the vocabulary" if known else "not in the vocabulary", [token.text for token in tokens])]


def _best_paths(word: str, scores: dict[str, float], count: int) -> list[tuple[float, list[str]]]:
    """Return the `count` best segmentations of a word, best first. The list is empty if no piece contains a character of the
    word."""
    longest = max(map(len, scores), default=0)
    best: list[list[tuple[float, list[str]]]] = [[(0.0, [])]]
    for end in range(1, len(word) + 1):
        paths = [
            (score + scores[word[start:end]], [*path, word[start:end]])
            for start in range(max(0, end - longest), end)
            if word[start:end] in scores and scores[word[start:end]] > -100
            for score, path in best[start]
        ]
        best.append(sorted(paths, key=lambda scored: (-scored[0], scored[1]))[:count])
    return [(score, path) for score, path in best[-1] if math.isfinite(score)]


def visible(text: str) -> str:
    """Replace whitespace and control characters with visible characters."""
    marks = {" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"}
    return "".join(marks.get(c) or (c if c.isprintable() else f"\\u{ord(c):04x}") for c in text)


_COLORS = 6
"""Number of token colors in explain.html."""
_NOTES = {
    "bpe": "BPE starts with the {units} of a word and applies merges. Merge 23 joins the pair of neighbors that was the most "
    "frequent one in the training text after the first 22 merges. If several merges are possible, the lowest number is applied "
    "first.",
    "unigram": "Unigram learns the probability of every token from the training text. Among all ways to divide a word into tokens, "
    "it chooses the one with the highest product of probabilities. log p is the logarithm of this product: closest to 0 is best.",
    "wordpiece": "WordPiece chooses the longest token at the start of the word, then the longest token at the start of the rest, "
    "and so on. Tokens inside a word begin with ##. A word that cannot be divided completely becomes one unknown token.",
    "word": "Every word in the vocabulary is one token. All other words become the unknown token.",
    "char": "Every character is one token.",
    "byte": "Every byte of the UTF-8 text is one token.",
}
"""Explanations of the steps, by tokenizer kind."""


def as_html(explanation: Explanation, title: str) -> str:
    """Return a self-contained HTML page: the text with colored tokens, then the steps of every word."""

    def boxes(parts: list[str], tooltips: list[str]) -> str:
        return "".join(
            f'<span class="t c{index % _COLORS}" title="{html.escape(tooltip)}">{html.escape(visible(part))}</span>'
            for index, (part, tooltip) in enumerate(zip(parts, tooltips, strict=True))
        )

    tokens = explanation.tokens
    is_open = " open" if len(explanation.words) <= 24 else ""
    sections = []
    for word in explanation.words:
        steps = "".join(
            f"<li><span>{html.escape(step.description)}</span><span>{boxes(step.parts, [''] * len(step.parts))}</span></li>"
            for step in word.steps
        )
        ids = " ".join(f"{token.id}" for token in word.tokens)
        sections.append(
            f"<details{is_open}><summary><code>{html.escape(visible(word.text))}</code> <small>{ids}</small></summary>"
            f"<ul>{steps}</ul></details>"
        )
    tooltips = [f"{token.id}" + (f", score {token.score:.3f}" if token.score is not None else "") for token in tokens]
    starts_with_bytes = any(step.description == "bytes" for word in explanation.words for step in word.steps)
    template = resources.files("tinylm.tokenizer").joinpath("explain.html").read_text(encoding="utf-8")
    content = {
        "TITLE": html.escape(title),
        "SUMMARY": f"{explanation.kind}: {len(explanation.text):,} characters, {len(tokens):,} tokens",
        "NOTE": _NOTES[explanation.kind].format(units="bytes" if starts_with_bytes else "characters"),
        "TEXT": boxes([token.text for token in tokens], tooltips),
        "WORDS": "\n".join(sections),
    }
    return re.sub(r"\{\{([A-Z]+)\}\}", lambda match: content[match[1]], template)
