"""Why a text becomes these tokens: the merges of a word one by one, the best path of a Unigram model with its scores, and so on."""

from __future__ import annotations

import html
import itertools
import math
from dataclasses import dataclass

from tinylm.errors import InputError
from tinylm.tokenizer.splits import byte_level_table
from tinylm.tokenizer.tokenizer import BYTE_TOKENS, Tokenizer

LONGEST = 20_000


@dataclass(frozen=True)
class Token:
    """A token of the text: its id, its text (bytes that are no characters of their own as \\xNN) and, for Unigram, its score."""

    id: int
    text: str
    score: float | None = None


@dataclass(frozen=True)
class Step:
    """What was done, and how the word was divided after it."""

    what: str
    parts: list[str]


@dataclass(frozen=True)
class Word:
    """A part of the text that the model sees by itself."""

    text: str
    tokens: list[Token]
    steps: list[Step]


@dataclass(frozen=True)
class Explanation:
    """`words` in order; white space that a tokenizer drops is in none of them."""

    kind: str
    text: str
    normalized: str
    words: list[Word]

    @property
    def tokens(self) -> list[Token]:
        return [token for word in self.words for token in word.tokens]


def explain(tokenizer: Tokenizer, text: str) -> Explanation:
    """The story of a text of at most `LONGEST` characters. Its tokens are those that `tokenizer.encode` gives."""
    if len(text) > LONGEST:
        raise InputError(f"{len(text):,} characters are too many to explain", where="TEXT", hint=f"at most {LONGEST:,}")
    backend = tokenizer.backend
    normalized = backend.normalizer.normalize_str(text) if backend.normalizer is not None else text
    words = []
    for part, added in _around_added(tokenizer, normalized):
        if added:
            id = backend.token_to_id(part)
            assert id is not None
            words.append(Word(part, [Token(id, part)], [Step("an added token, whole whatever stands around it", [part])]))
        else:
            divided = backend.pre_tokenizer.pre_tokenize_str(part) if backend.pre_tokenizer is not None else [(part, None)]
            words += [_Story(tokenizer).of(word) for word, _ in divided if word]
    found = Explanation(tokenizer.kind, text, normalized, words)
    if [token.id for token in found.tokens] != tokenizer.encode(text):
        raise InputError("this tokenizer does more than is explained here (a post-processor, or added tokens in normalised text)")
    return found


def _around_added(tokenizer: Tokenizer, text: str) -> list[tuple[str, bool]]:
    """The text cut around its added tokens, the leftmost and of those the longest first."""
    added = sorted((str(t.content) for t in tokenizer.backend.get_added_tokens_decoder().values() if not t.special), key=len)
    parts: list[tuple[str, bool]] = []
    while text:
        at, token = min(
            ((text.find(token), token) for token in reversed(added) if token in text), default=(-1, ""), key=lambda f: f[0]
        )
        if at < 0:
            parts.append((text, False))
            break
        parts += [(text[:at], False)] * (at > 0) + [(token, True)]
        text = text[at + len(token) :]
    return parts


class _Story:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._model = tokenizer.described["model"]

    def of(self, word: str) -> Word:
        tell = {"BPE": self._merges, "Unigram": self._path, "WordPiece": self._greedy}.get(self._model["type"], self._looked_up)
        tokens = [token.id for token in self._tokenizer.backend.model.tokenize(word)]
        scores = self._scores(tokens)
        listed = [Token(id, self._shown_id(id), score) for id, score in zip(tokens, scores, strict=True)]
        return Word(self._shown(word), listed, tell(word, listed))

    def _scores(self, ids: list[int]) -> list[float | None]:
        if self._model["type"] != "Unigram":
            return [None] * len(ids)
        return [self._model["vocab"][id][1] for id in ids]

    def _shown_id(self, id: int) -> str:
        token = self._tokenizer.backend.id_to_token(id) or ""
        return token if token in BYTE_TOKENS or id == self._tokenizer.unknown else self._shown(token)

    def _shown(self, token: str) -> str:
        """A model's token as text; bytes of a character cut in two as \\xNN."""
        table = byte_level_table()
        if not self._tokenizer.is_byte_level or not all(character in table for character in token):
            return token
        return bytes(table[character] for character in token).decode("utf-8", "backslashreplace")

    def _merges(self, word: str, tokens: list[Token]) -> list[Step]:
        ranks = self._tokenizer.merge_ranks
        parts = list(word)
        steps = [Step("characters" if not self._tokenizer.is_byte_level else "bytes", [self._shown(part) for part in parts])]
        while found := [(ranks[pair], at) for at, pair in enumerate(itertools.pairwise(parts)) if pair in ranks]:
            rank, at = min(found)
            left, right = parts[at : at + 2]
            parts[at : at + 2] = [left + right]
            what = f"merge {rank + 1:,}: {self._shown(left)!r} + {self._shown(right)!r}"
            steps.append(Step(what, [self._shown(part) for part in parts]))
        if [token.text for token in tokens] != steps[-1].parts:
            steps.append(Step("characters outside the alphabet become bytes or unknown", [token.text for token in tokens]))
        return steps

    def _path(self, word: str, tokens: list[Token]) -> list[Step]:
        scores = dict(self._tokenizer.described["model"]["vocab"])
        total = sum(token.score or 0.0 for token in tokens)
        steps = [Step(f"best path, log probability {total:.2f}", [token.text for token in tokens])]
        others = [(score, path) for score, path in _best_paths(word, scores, 4) if path != [token.text for token in tokens]]
        return steps + [Step(f"next best, {score:.2f}", path) for score, path in others[:3]]

    def _greedy(self, word: str, tokens: list[Token]) -> list[Step]:
        if [token.id for token in tokens] == [self._tokenizer.unknown]:
            return [Step("some part of it is in no piece: unknown as a whole", [tokens[0].text])]
        texts = [token.text for token in tokens]
        return [
            Step(f"longest piece that begins here: {text!r}", [*texts[: at + 1], *(["..."] if at + 1 < len(texts) else [])])
            for at, text in enumerate(texts)
        ]

    def _looked_up(self, word: str, tokens: list[Token]) -> list[Step]:
        known = [token.id for token in tokens] != [self._tokenizer.unknown]
        return [Step("in the vocabulary" if known else "not in the vocabulary", [token.text for token in tokens])]


def _best_paths(word: str, scores: dict[str, float], count: int) -> list[tuple[float, list[str]]]:
    """The `count` best segmentations of a word into pieces, best first; none when a character is in no piece."""
    longest = max(map(len, scores), default=0)
    best: list[list[tuple[float, list[str]]]] = [[(0.0, [])]]
    for end in range(1, len(word) + 1):
        ways = [
            (score + scores[word[start:end]], [*path, word[start:end]])
            for start in range(max(0, end - longest), end)
            if word[start:end] in scores and scores[word[start:end]] > -100
            for score, path in best[start]
        ]
        best.append(sorted(ways, key=lambda way: (-way[0], way[1]))[:count])
    return [way for way in best[-1] if math.isfinite(way[0])]


def visible(text: str) -> str:
    """White space and control characters made to be seen."""
    marks = {" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"}
    return "".join(marks.get(c) or (c if c.isprintable() else f"\\u{ord(c):04x}") for c in text)


def as_html(found: Explanation, title: str) -> str:
    """A page that stands by itself: the text in colored tokens, and below each word its story."""
    colors = ("#dbeafe", "#fef3c7", "#dcfce7", "#fce7f3", "#ede9fe", "#ffedd5")

    def boxes(parts: list[str], titles: list[str]) -> str:
        return "".join(
            f'<span class="t" style="background:{colors[at % len(colors)]}" title="{html.escape(hint)}">'
            f"{html.escape(visible(part))}</span>"
            for at, (part, hint) in enumerate(zip(parts, titles, strict=True))
        )

    tokens = found.tokens
    stories = []
    for word in found.words:
        rows = "".join(
            f"<tr><td>{html.escape(step.what)}</td><td>{boxes(step.parts, [''] * len(step.parts))}</td></tr>" for step in word.steps
        )
        ids = " ".join(str(token.id) for token in word.tokens)
        stories.append(
            f"<details{' open' * (len(found.words) <= 24)}><summary><code>{html.escape(visible(word.text))}</code> "
            f"<small>{ids}</small></summary><table>{rows}</table></details>"
        )
    hints = [f"{token.id}" + (f", score {token.score:.3f}" if token.score is not None else "") for token in tokens]
    return _PAGE.format(
        title=html.escape(title),
        summary=f"{found.kind}: {len(found.text):,} characters, {len(tokens):,} tokens",
        text=boxes([token.text for token in tokens], hints),
        words="\n".join(stories),
    )


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title><style>
body {{ font: 16px/1.6 system-ui, sans-serif; color: #1f2937; background: #fff }}
body {{ max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
.t {{ font-family: ui-monospace, monospace; white-space: pre-wrap; color: #111 }}
.t {{ padding: 1px 2px; margin: 1px; border-radius: 3px }}
td {{ padding: 2px 12px 2px 0; vertical-align: top }} td:first-child {{ color: #6b7280; white-space: nowrap }}
summary {{ cursor: pointer }} small {{ color: #6b7280 }} .all {{ overflow-wrap: anywhere }}
@media (prefers-color-scheme: dark) {{ body {{ color: #e5e7eb; background: #111827 }}
td:first-child, small {{ color: #9ca3af }} }}
</style></head><body><h1>{title}</h1><p>{summary}</p><p class="all">{text}</p>
{words}
</body></html>
"""
