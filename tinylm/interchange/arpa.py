"""Read and write ARPA files, the text format for n-gram models that KenLM, SRILM and speech recognizers use.

The end-of-text token is `<s>` at the beginning of an n-gram and `</s>` at its end. The unknown token is `<unk>`. Whitespace
separates words in the file, so whitespace inside a token is written as `<0x20>` for a space, `<0x0A>` for a line feed, and so on.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

from tinylm.data.kneser_ney import NgramTables
from tinylm.errors import InputError
from tinylm.model.base import Model
from tinylm.model.ngram_model import Ngram
from tinylm.paths import atomic_file
from tinylm.recipe.base import ModelVariant
from tinylm.recipe.fixed_context import NgramSection
from tinylm.text.files import TextFile, open_bytes, read_lines
from tinylm.tokenizer import Tokenizer
from tinylm.tokenizer.tokenizer import END_OF_TEXT
from tinylm.tokenizer.tokenizer import UNKNOWN as UNKNOWN_TOKEN

BEGIN, END, UNKNOWN = "<s>", "</s>", "<unk>"
_LOG_ZERO = -99.0
"""The log10-probability of events that cannot occur, such as predicting `<s>`."""
_UNKNOWN_LOGPROB = -30.0
"""The log10-probability of the unknown token if a file does not contain it, and the minimum for all tokens.

The logarithm of a probability that is 0 in float32 would be infinite, and so would the loss of a text with this token.
"""
_MAX_LOG = 38.0
"""The log10 of the largest weight that float32 can hold."""
_START_BYTES = 4096
_LN10 = math.log(10)


def words_of(tokenizer: Tokenizer) -> list[str]:
    """Return the word for each token id. The word of the end-of-text token is `</s>`.

    Raises `InputError` if two tokens have the same word.
    """
    words = [re.sub(r"\s", lambda match: "".join(f"<0x{byte:02X}>" for byte in match[0].encode()), _text(tokenizer, id))
             for id in range(tokenizer.vocab_size)]  # fmt: skip
    if tokenizer.end_of_text is not None:
        words[tokenizer.end_of_text] = END
    if tokenizer.unknown is not None:
        words[tokenizer.unknown] = UNKNOWN
    seen: dict[str, int] = {BEGIN: -1}
    for id, word in enumerate(words):
        if not word or word in seen:
            raise InputError(f"the tokens {seen.get(word, id)} and {id} would both be {word!r} in an ARPA file", where="--to arpa")
        seen[word] = id
    return words


def _text(tokenizer: Tokenizer, id: int) -> str:
    return str(tokenizer.backend.id_to_token(id))


def check_supported(model: ModelVariant) -> None:
    """Raise `InputError` unless the model is an n-gram model."""
    if not isinstance(model, NgramSection):
        problem = f"ARPA files contain n-gram models, but this model has the {model.architecture} architecture"
        raise InputError(problem, where="--to arpa")


def load_tables(network: Model, tables: NgramTables) -> None:
    """Replace the probability tables of an n-gram model."""
    assert isinstance(network, Ngram)
    network.set_tables(tables)


def tables_of(network: Model) -> NgramTables:
    """Return the probability tables of an n-gram model."""
    assert isinstance(network, Ngram)
    return network.tables


def check_export(path: Path, tables: NgramTables, tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[float, tuple[str, ...]]:
    """Compare the log-probabilities from a file with those from the model on the ids of one document.

    The file is read with this module and, if it is installed, with KenLM. Returns the largest difference in nats and the names of
    the programs that read the file.
    """
    tokens = np.asarray(ids, dtype=np.int64)
    expected = np.log(tables.token_probabilities(tokens, np.arange(len(tokens))))[1:]
    words = words_of(tokenizer)
    again, _ = read(path, {word: id for id, word in enumerate(words)})
    read_back = np.log(again.token_probabilities(tokens, np.arange(len(tokens))))[1:]
    difference, programs = float(np.abs(read_back - expected).max()), ["tinylm's reader"]
    if find_spec("kenlm") is not None:
        import kenlm

        scores = kenlm.Model(str(path)).full_scores(" ".join(words[id] for id in ids[1:]), bos=True, eos=False)
        theirs = np.array([score for score, _, _ in scores]) * _LN10
        difference = max(difference, float(np.abs(theirs - expected).max()))
        programs.append(f"KenLM {version('kenlm')}")
    return difference, tuple(programs)


def write(path: Path, tables: NgramTables, words: Sequence[str], end_of_text: int) -> None:
    """Write an n-gram model. Numbers have 7 significant digits, which is about the precision of float32."""
    with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        file.write("\\data\\\n")
        sizes = [len(probabilities) for probabilities in tables.probabilities]
        file.writelines(f"ngram {k}={size + (k == 1)}\n" for k, size in enumerate(sizes, 1))
        texts, last_ids = list(words), np.arange(len(words))
        for k in range(1, tables.order + 1):
            file.write(f"\n\\{k}-grams:\n")
            backoffs = tables.backoffs[k - 1] if k < tables.order else None
            if k == 1:
                file.write(_line(_LOG_ZERO, BEGIN, None if backoffs is None else backoffs[end_of_text]))
            else:
                prefixes, last_ids = np.divmod(tables.keys[k - 2], tables.vocab_size)
                before = [BEGIN if k == 2 and prefix == end_of_text else texts[prefix] for prefix in prefixes.tolist()]
                texts = [f"{prefix} {words[token]}" for prefix, token in zip(before, last_ids.tolist(), strict=True)]
            for index, text in enumerate(texts):
                # `</s>` ends a text, so it is never a context and has no backoff weight. As a context, the token is `<s>`.
                backoff = None if backoffs is None or last_ids[index] == end_of_text else backoffs[index]
                file.write(_line(math.log10(tables.probabilities[k - 1][index]), text, backoff))
        file.write("\n\\end\\\n")


def _line(logprob: float, text: str, backoff: float | None) -> str:
    weight = "" if backoff is None else f"\t{_LOG_ZERO if backoff == 0 else math.log10(backoff):.7g}"
    return f"{logprob:.7g}\t{text}{weight}\n"


def is_arpa(path: Path) -> bool:
    """Whether a file, which may be compressed, is an ARPA file: its name ends in .arpa, or it begins with a `\\data\\` line."""
    file = TextFile.at(str(path), str(path))
    if not path.is_file() or file.suffix == ".arpa":
        return path.is_file()
    try:
        with open_bytes(file) as stream:
            return b"\\data\\" in (line.strip() for line in stream.read(_START_BYTES).split(b"\n"))
    except Exception:  # each decompressor has its own exceptions
        return False


def read(path: Path, ids: Mapping[str, int] | None = None) -> tuple[NgramTables, list[str]]:
    """Read an n-gram model from a file, which may be compressed. Returns the tables and the word for each id.

    `ids` maps each word to its id. By default, words are numbered in file order, and `</s>` has the last id. Raises `InputError`
    if the file is not a complete ARPA file, or if it contains an n-gram without its prefix.
    """
    file = TextFile.at(str(path), str(path))
    with open_bytes(file) as stream:
        try:
            return _Reader(path, (line.decode("utf-8") for line in read_lines(file.name, stream))).tables(ids)
        except UnicodeDecodeError:
            hint = "convert it, for example with: iconv -f LATIN1 -t UTF-8"
            raise InputError("contains a word that is not UTF-8", where=str(path), hint=hint) from None
        except (ValueError, IndexError, KeyError) as error:
            raise InputError(f"not a complete ARPA file: {error}", where=str(path)) from None


def word_tokenizer(words: Sequence[str]) -> Tokenizer:
    """Create a tokenizer that splits text at whitespace, for a file without a tokenizer."""
    names = {END: END_OF_TEXT, UNKNOWN: UNKNOWN_TOKEN}
    vocabulary = {names.get(word, word): id for id, word in enumerate(words)}
    if len(vocabulary) < len(words):
        raise InputError(f"contains the reserved word {END_OF_TEXT} or {UNKNOWN_TOKEN}", where="the ARPA file")
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN_TOKEN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([tokenizers.AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return Tokenizer(tokenizers.Tokenizer.from_str(backend.to_str()))


def _probability(logprob: float) -> float:
    return float(10 ** max(logprob, _UNKNOWN_LOGPROB))


class _Reader:
    """A parser for the lines of an ARPA file."""

    def __init__(self, path: Path, lines: Iterable[str]) -> None:
        self._path = path
        self._lines = enumerate(lines, 1)

    def tables(self, given: Mapping[str, int] | None) -> tuple[NgramTables, list[str]]:
        sizes = self._sizes()
        unigrams = list(self._section(1))
        if len(unigrams) != sizes[0]:
            raise ValueError(f"{len(unigrams):,} 1-grams instead of {sizes[0]:,}")
        known = {words[0]: (logprob, backoff) for logprob, words, backoff in unigrams}
        if END not in known or BEGIN not in known:
            raise ValueError(f"{BEGIN} or {END} is missing from the 1-grams")
        words = [word for word in known if word not in (BEGIN, END)] + [END]
        if given is None:
            if UNKNOWN not in known:
                known[UNKNOWN] = (_UNKNOWN_LOGPROB, 0.0)
                words.insert(0, UNKNOWN)
        else:
            if set(words) != set(given):
                different = min(set(words) ^ set(given))
                raise ValueError(f"its words do not match the tokenizer: {different!r} is only in one of them")
            words.sort(key=given.__getitem__)
        ids = {word: id for id, word in enumerate(words)}
        ids[BEGIN] = ids[END]
        vocab_size = len(words)
        probabilities = [np.array([_probability(known[word][0]) for word in words], dtype=np.float32)]
        backoffs = [np.array([10 ** known[BEGIN if word == END else word][1] for word in words], dtype=np.float32)]
        keys: list[np.ndarray] = []
        for k in range(2, len(sizes) + 1):
            entries = [
                (self._key(keys, [ids[word] for word in words_], vocab_size), _probability(logprob), 10**backoff)
                for logprob, words_, backoff in self._section(k)
            ]
            if len(entries) != sizes[k - 1]:
                raise ValueError(f"{len(entries):,} {k}-grams instead of {sizes[k - 1]:,}")
            entries.sort()
            keys.append(np.array([key for key, _, _ in entries], dtype=np.int64))
            probabilities.append(np.array([probability for _, probability, _ in entries], dtype=np.float32))
            backoffs.append(np.array([backoff for _, _, backoff in entries], dtype=np.float32))
        tables = NgramTables(vocab_size, tuple(keys), tuple(probabilities), tuple(backoffs[:-1]))
        if (problem := tables.problem()) is not None:
            raise ValueError(problem)
        return tables, words

    def _sizes(self) -> list[int]:
        """Read the header. Returns the number of n-grams of each order."""
        sizes = []
        for _, line in self._lines:
            if line.strip() == "\\1-grams:":
                break
            if match := re.fullmatch(r"ngram (\d+)\s*=\s*(\d+)", line.strip()):
                sizes.append(int(match[2]))
                if int(match[1]) != len(sizes):
                    raise ValueError("the orders in the header are not 1, 2, 3, ...")
        if not sizes:
            raise ValueError("it has no header")
        return sizes

    def _section(self, k: int) -> Iterator[tuple[float, list[str], float]]:
        """Yield (log10 probability, words, log10 backoff weight) for each k-gram."""
        for number, line in self._lines:
            text = line.strip("\r\n")
            if text.startswith("\\") and (text == "\\end\\" or text == f"\\{k + 1}-grams:"):
                return
            if not text.strip():
                continue
            parts = re.split(r"[ \t]+", text.strip(" \t"))
            if len(parts) not in (k + 1, k + 2):
                raise ValueError(f"line {number} is not a {k}-gram")
            logprob, backoff = float(parts[0]), float(parts[k + 1]) if len(parts) == k + 2 else 0.0
            if max(logprob, backoff) > _MAX_LOG:
                raise ValueError(f"a number in line {number} is too large")
            yield logprob, parts[1 : k + 1], backoff
        raise ValueError(f"it ends within the {k}-grams")

    def _key(self, keys: list[np.ndarray], gram: list[int], vocab_size: int) -> int:
        """Return the key of an n-gram. Raises `ValueError` if its prefix is not among the n-grams of lower orders."""
        index = gram[0]
        for known, token in zip(keys, gram[1:-1], strict=True):
            key = index * vocab_size + token
            index = int(np.searchsorted(known, key))
            if index == len(known) or known[index] != key:
                raise ValueError("an n-gram occurs without its prefix")
        return index * vocab_size + gram[-1]
