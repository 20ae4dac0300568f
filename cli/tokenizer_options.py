"""Options shared by several `tinylm tokenize` subcommands: which tokenizer to use, and how to train one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from tinylm.errors import InputError, did_you_mean

from .console import checked_text, open_run, stderr_console

if TYPE_CHECKING:
    from tinylm.recipe.schema import LearnedTokenizer
    from tinylm.tokenizer import Tokenizer

KINDS = ("bpe", "unigram", "wordpiece", "word", "char", "byte")
TOKENIZER = typer.Option(
    None,
    "--tokenizer",
    "-t",
    help="A tokenizer.json, FILE.tiktoken[:SPLIT] or a sentencepiece FILE.model. Default: the run's tokenizer.",
)
DEFAULT_VOCAB_SIZE = 8192


def load_tokenizer(tokenizer: str | None, run: str | None, quiet: bool) -> Tokenizer:
    """Load the tokenizer from --tokenizer, or a run's tokenizer if --tokenizer is not set."""
    from tinylm.tokenizer import Tokenizer

    if tokenizer is None:
        return open_run(run, stderr_console(), quiet=quiet).tokenizer
    if run is not None:
        raise InputError("these options are mutually exclusive", where="--tokenizer, --run")
    return Tokenizer.load(tokenizer)


def tokenizer_section(kind: str, **options: Any) -> Any:
    """Build and validate the `tokenizer` section of a recipe from these options. Options that are None are ignored.

    Errors refer to command-line options instead of recipe keys.
    """
    from tinylm.recipe import schema

    if kind not in KINDS:
        raise InputError(f"must be one of {', '.join(KINDS)}, not {kind!r}", where="--kind", hint=did_you_mean(kind, KINDS))
    sections = dict(zip(KINDS, schema.LEARNED_TOKENIZERS, strict=True))
    known = sections[kind].model_fields
    for key, value in options.items():
        if value is not None and key not in known:
            supporting = [name for name, section in sections.items() if key in section.model_fields]
            raise InputError(f"not supported for {kind} tokenizers, only for {', '.join(supporting)}", where=_option(key))
    if "vocab_size" in known:
        options["vocab_size"] = DEFAULT_VOCAB_SIZE if options.get("vocab_size") is None else options["vocab_size"]
        options["allow_smaller"] = bool(options.get("allow_smaller"))
    alphabet = options.get("alphabet")
    if alphabet is not None and alphabet.isdecimal():
        options["alphabet"] = int(alphabet)
    for key in ("split", "alphabet", "special_tokens", "added_tokens"):
        value = options.get(key)
        for text in [value] if isinstance(value, str) else value if isinstance(value, list) else []:
            checked_text(text, _option(key))
    return _validated({"kind": kind, **{key: value for key, value in options.items() if value is not None}})


def _validated(section: dict[str, Any]) -> LearnedTokenizer:
    from tinylm.recipe import RecipeError, loads

    text = json.dumps({"data": {"train": "-"}, "training": {"steps": 1}, "tokenizer": section}, ensure_ascii=False)
    try:
        return loads(text, check_files=False).tokenizer  # type: ignore[return-value]
    except RecipeError as error:
        problem = error.problems[0].removeprefix("recipe:1: tokenizer.")
        key, _, message = problem.partition(": ")
        raise InputError(message or problem, where=_option(key) if message else "--kind") from None


@contextmanager
def option_names_in_errors() -> Iterator[None]:
    """Replace a recipe key in an `InputError` with the command-line option: `tokenizer.split` with `--split`."""
    try:
        yield
    except InputError as error:
        if error.where is None or not error.where.startswith("tokenizer."):
            raise
        raise InputError(error.message, where=_option(error.where.removeprefix("tokenizer.")), hint=error.hint) from None


def _option(key: str) -> str:
    """Return the command-line option for a recipe key."""
    return "--" + {"special_tokens": "special", "added_tokens": "added"}.get(key, key).replace("_", "-")
