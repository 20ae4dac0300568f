"""Read a recipe file, and report all problems at once with their line numbers.

This module builds a `Recipe` from a YAML file (or its text) and `--set` overrides. As in YAML 1.2, `3e-4` and `1e6` are numbers,
`off` is a string (which flags accept as false), and duplicate keys are errors.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from tinylm import hints
from tinylm.errors import InputError, did_you_mean
from tinylm.recipe.checks import KeyPath, check_embedding_recipe, check_recipe, listed
from tinylm.recipe.embeddings import EmbeddingRecipe
from tinylm.recipe.notation import Loader
from tinylm.recipe.schema import DEFAULT_ARCHITECTURE, LENGTHS, Recipe
from tinylm.recipe.sections import Variants, all_keys, expand, variants_of
from tinylm.recipe.values import printable, show


class RecipeError(InputError):
    """All problems in a recipe, one per line, as `file:line: key: problem (what to do)`."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


@dataclass
class _Document:
    """A YAML file as plain values, with the location of each key (`file:line` or the `--set` option)."""

    name: str
    values: dict[str, Any] = field(default_factory=dict)
    locations: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[tuple[str, str]] = field(default_factory=list)
    """(location, message) of each problem found while parsing."""

    @property
    def schema(self) -> type[Recipe] | type[EmbeddingRecipe]:
        """The recipe class, which depends on the key `kind`."""
        return EmbeddingRecipe if self.values.get("kind") == "embeddings" else Recipe

    def location(self, path: KeyPath) -> str:
        """Return the location of `path` or, if the key is missing, of the innermost section that would contain it."""
        while path and path not in self.locations:
            path = path[:-1]
        return self.locations.get(path, self.name)


def load(source: str | Path, overrides: Sequence[str] = (), *, check_files: bool = True) -> Recipe:
    """Read the recipe file `source`, with `--set` overrides such as `training.optimizer.lr=3e-4`.

    With `check_files=False`, the files that the recipe refers to do not have to exist. Raises `InputError` if the file cannot be
    read or is an embedding recipe, and `RecipeError` with all problems if it is not valid.
    """
    return _require_language_model(load_any(source, overrides, check_files=check_files), str(source))


def load_any(source: str | Path, overrides: Sequence[str] = (), *, check_files: bool = True) -> Recipe | EmbeddingRecipe:
    """Like `load`, but for language-model and embedding recipes."""
    path = Path(source)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 at byte {error.start}", where=str(path), hint="a recipe is a YAML text file") from None
    except OSError as error:
        raise InputError(error.strerror or "cannot be read", where=str(path)) from None
    return loads_any(text, overrides, name=str(path), check_files=check_files)


def loads(text: str, overrides: Sequence[str] = (), *, name: str = "recipe", check_files: bool = True) -> Recipe:
    """Like `load`, but for YAML text. Error messages show `name` instead of a file name."""
    return _require_language_model(loads_any(text, overrides, name=name, check_files=check_files), name)


def _require_language_model(recipe: Recipe | EmbeddingRecipe, where: str) -> Recipe:
    if isinstance(recipe, EmbeddingRecipe):
        raise InputError("this recipe is for embeddings, not for a language model", where=where, hint="see `tinylm embed --help`")
    return recipe


def loads_any(
    text: str, overrides: Sequence[str] = (), *, name: str = "recipe", check_files: bool = True
) -> Recipe | EmbeddingRecipe:
    """Like `loads`, but for language-model and embedding recipes."""
    document = _parse(text, name)
    for override in overrides:
        _apply(document, override)
    _inherit(document)
    recipe, problems = _validate(document, check_files)
    problems = document.problems + problems
    if problems or recipe is None:
        ordered = sorted(dict.fromkeys(problems), key=lambda problem: _line_of(problem[0]))
        raise RecipeError([f"{where}: {message}" for where, message in ordered])
    return recipe


def _line_of(where: str) -> int:
    """Return the line number in `file:line`. Locations without a line number, such as options, sort last."""
    match = None if where.startswith("--set ") else re.search(r":([0-9]{1,9})$", where)
    return int(match[1]) if match else sys.maxsize


def _parse(text: str, name: str) -> _Document:
    document = _Document(name)
    _reject_other_line_breaks(text, name)
    try:
        loader = Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                raise InputError("the recipe is empty", where=name, hint="`tinylm recipes` lists recipes to start from")
            if not isinstance(node, yaml.MappingNode):
                kind = "list" if isinstance(node, yaml.SequenceNode) else "single value"
                problem = f"a recipe must be a mapping of sections such as `data:` and `training:`, not a {kind}"
                hint = None if name == "recipe" else "to train on a text: `tinylm new TEXT --out my.yaml` writes a recipe for it"
                raise InputError(problem, where=name, hint=hint)
            document.values = _construct(loader, node, (), document)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"{name}:{mark.line + 1}" if mark else name
        problem = error.problem or "not YAML"
        if "'\\t'" in problem:
            raise InputError("YAML cannot be indented with tabs", where=line, hint="use spaces") from None
        hint = next((hint for start, hint in _YAML_HINTS.items() if problem.startswith(start)), None)
        raise InputError(f"not valid YAML: {problem}", where=line, hint=hint) from None
    except RecursionError:
        raise InputError(_TOO_LARGE, where=name) from None
    except yaml.YAMLError as error:
        raise InputError(f"not valid YAML: {str(error).splitlines()[0]}", where=name) from None
    return document


_YAML_HINTS = {
    "sequence entries": "quote a value that is a single -",
    "mapping values": 'quote a value that contains a colon, for example name: "my run: v2"',
    "found character '%'": "quote a value that begins with %",
    "found character '@'": "quote a value that begins with @",
    "found character '`'": "quote a value that begins with `",
    "while scanning a quoted scalar": "close the quotes",
    "found unexpected end of stream": "close the quotes",
    "expected ',' or": "close the brackets, and separate their items with commas",
    "could not find expected ':'": "write a space after the colon, for example name: my-run",
    "found undefined alias": "quote a value that begins with *, such as a glob",
}
"""Hints for YAML parser errors, by the beginning of the error message."""


def _reject_other_line_breaks(text: str, name: str) -> None:
    """Raise `InputError` for line separators that YAML 1.1 treats as line breaks, but editors and YAML 1.2 do not."""
    match = re.search("[\x85\u2028\u2029]", text)
    if match is not None:
        code, escape = f"U+{ord(match[0]):04X}", {"\x85": "\\N", "\u2028": "\\L", "\u2029": "\\P"}[match[0]]
        line = text.count("\n", 0, match.start()) + 1
        raise InputError(f"contains the line separator {code}", where=f"{name}:{line}", hint=f"write {escape} in double quotes")


def _construct(loader: Loader, node: yaml.Node, path: KeyPath, document: _Document) -> Any:
    if len(path) > _MAX_DEPTH or len(document.locations) > _MAX_KEYS:  # a recursive alias, or nested aliases that explode
        raise InputError(_TOO_LARGE, where=f"{document.name}:{node.start_mark.line + 1}")
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = f"{document.name}:{key_node.start_mark.line + 1}"
            key = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "?"
            if not key.isprintable():
                document.problems.append((line, f"{show(key)} is not a valid key"))
                continue
            if key in mapping:
                first = document.locations[(*path, key)].rpartition(":")[2]
                document.problems.append((line, f"{key} is set twice (first on line {first})"))
                continue
            document.locations[(*path, key)] = line
            mapping[key] = _construct(loader, value_node, (*path, key), document)
        return mapping
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            document.locations[(*path, index)] = f"{document.name}:{item.start_mark.line + 1}"
        return [_construct(loader, item, (*path, index), document) for index, item in enumerate(node.value)]
    return _scalar(loader, node, f"{document.name}:{node.start_mark.line + 1}")


def _scalar(loader: Loader, node: yaml.Node, where: str) -> Any:
    try:
        value = loader.construct_object(node, deep=True)
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError):  # a value that its tag cannot convert
        kind = str(node.tag).rpartition(":")[2]
        raise InputError(f"{show(node.value)} is not valid for {kind}", where=where, hint="remove tags such as !!int") from None
    problem = _text_problem(value)
    if problem is not None:
        raise InputError(problem, where=where)
    return value


def _text_problem(value: object) -> str | None:
    """Return why a string is not a valid value, or None. Surrogates U+DC80 to U+DCFF are valid: they encode non-UTF-8 paths."""
    if isinstance(value, str) and "\0" in value:
        return f"{show(value)} contains a NUL character"
    if isinstance(value, str) and any("\ud800" <= c <= "\udfff" and not "\udc80" <= c <= "\udcff" for c in value):
        return f"{show(value)} contains an unpaired surrogate, which UTF-8 cannot encode"
    return None


def _apply(document: _Document, override: str) -> None:
    """Set one key in the document from the override `SECTION.KEY=VALUE`."""
    key, equals, written = override.partition("=")
    path = tuple(key.strip().split("."))
    where = f"--set {printable(override)}"
    if not equals or not all(path) or len(path) > _MAX_DEPTH or not key.isprintable():
        document.problems.append((where, "must have the form SECTION.KEY=VALUE, for example training.steps=100"))
        return
    target: dict[str, Any] = document.values
    section: type[BaseModel] | None = document.schema
    for depth, part in enumerate(path[:-1], 1):
        variants = None if section is None else variants_of(section, part)
        if section is not None and not isinstance(target.get(part), dict):
            target[part] = _expand_for(section, part, target.get(part), path[depth])
        if not isinstance(target.get(part), dict):
            target[part] = {}
            document.locations[path[:depth]] = where
        target = target[part]
        section = None if variants is None else variants.first_with(path[depth])
    if path[-1] in LENGTHS and path[:-1] == ("training",):
        for other in LENGTHS:  # a length on the command line replaces the one in the file
            if not document.locations.get((*path[:-1], other), "").startswith("--set"):
                target.pop(other, None)
    value = _parse_value(written)
    problem = _text_problem(value)
    if problem is not None:
        document.problems.append((f"--set {key}", problem))
    target[path[-1]] = "" if problem else value
    for inner in [known for known in document.locations if known[: len(path)] == path]:  # the value in the file is replaced
        del document.locations[inner]
    document.locations[path] = where


def _expand_for(section: type[BaseModel], key: str, value: Any, next_key: str) -> Any:
    """Expand `value` if it is a short form, so that `next_key` can be set in its section. Return other values unchanged."""
    expanded = expand(section, key, value)
    variants = variants_of(section, key)
    if not isinstance(expanded, dict) or variants is None:
        return value
    # `--set data.heldout.share=0.2` replaces `heldout: b.txt` from the file, because `share` and `sources` exclude each other.
    chosen_by_keys = variants.is_union and variants.discriminator is None
    fits = any({*expanded, next_key} <= variant.model_fields.keys() for variant in variants.by_tag.values())
    return expanded if fits or not chosen_by_keys else None


def _inherit(document: _Document) -> None:
    """Copy missing `model:` keys and a missing `tokenizer:` section from the run that `model.init_from` refers to."""
    model = document.values.get("model")
    init_from = _mapping(model).get("init_from")
    run = init_from.get("run") if isinstance(init_from, dict) else init_from
    if not isinstance(run, str):
        return
    folder = Path(os.path.expanduser(run))
    folder = folder.parent.parent if folder.parent.name == "checkpoints" else folder
    try:
        text = (folder / "recipe.yaml").read_text(encoding="utf-8")
    except (OSError, ValueError):  # ValueError: not UTF-8, or not a valid path
        return  # if the run does not exist, `checks` reports it
    inherited = _mapping(_parse(text, str(folder / "recipe.yaml")).values.get("model"))
    run_architecture = inherited.get("architecture", DEFAULT_ARCHITECTURE)
    if _mapping(model).get("architecture", run_architecture) != run_architecture:
        problem = f"model.init_from: the architecture of {run} is {run_architecture}, not {_mapping(model)['architecture']}"
        document.problems.append((document.location(("model", "init_from")), problem))
        return
    for key in ("init_embeddings", "freeze_embeddings"):  # they only apply to an embedding that is not loaded from a run
        inherited.pop(key, None)
    document.values["model"] = {**inherited, **_mapping(model)}
    document.values.setdefault("tokenizer", {"path": str(folder / "tokenizer.json")})


def _parse_value(written: str) -> Any:
    """Parse the value of an override: a YAML scalar, or a list or mapping in brackets. Anything else, such as `*.txt`, is text."""
    try:
        loader = Loader(written)
        try:
            node = loader.get_single_node()
            block = isinstance(node, yaml.CollectionNode) and not node.flow_style
            if block or node is None:
                return written if written.strip() else None
            return _construct(loader, node, (), _Document("--set"))
        finally:
            loader.dispose()
    except (yaml.YAMLError, InputError, RecursionError):
        return written


_MAX_DEPTH, _MAX_KEYS = 16, 10_000
_MAX_ROUNDS = 20
"""Maximum number of validation rounds. Each round excludes the invalid keys found so far."""
_TOO_LARGE = "nested too deeply or too large for a recipe"


def _validate(document: _Document, check_files: bool) -> tuple[Recipe | EmbeddingRecipe | None, list[tuple[str, str]]]:
    """Return the recipe (None if its structure is invalid) and its problems as (location, message).

    Invalid keys are removed and the rest is validated again, so that one mistake does not hide another.
    """
    problems: list[tuple[str, str]] = []
    values = document.values
    wrong: set[KeyPath] = set()
    for _ in range(_MAX_ROUNDS):
        try:
            recipe = document.schema.model_validate(values)
        except ValidationError as error:
            errors = [_problem(item, values, document.schema) for item in error.errors(include_url=False)]
            by_path = {problem.path: problem for problem in errors}  # one problem per key
            for problem in by_path.values():
                problems.append((document.location(problem.location), f"{_dotted(problem.shown)}: {problem.message}"))
            bad = {_outside_lists(path) for path in by_path}
            wrong |= bad
            values = _without(values, bad)
            values = _with_required(values, document.schema, wrong)
            continue
        checks = check_recipe if isinstance(recipe, Recipe) else check_embedding_recipe
        for path, message in checks(recipe, check_files):  # type: ignore[arg-type]  # `checks` matches the recipe's class
            if not any(path[: len(bad)] == bad or bad[: len(path)] == path for bad in wrong):
                problems.append((document.location(path), f"{_dotted(path)}: {message}"))
        return recipe, problems
    return None, problems


def _with_required(values: dict[str, Any], schema: type[BaseModel], wrong: set[KeyPath]) -> dict[str, Any]:
    """Return `values` with placeholders for missing required keys, so that the other keys can be validated.

    The placeholders are added to `wrong`, because the missing keys have already been reported.
    """
    values = dict(values)
    if not isinstance(values.get("data"), dict) or not values["data"].get("train"):
        values["data"] = {**_mapping(values.get("data")), "train": "missing"}
        wrong.add(("data", "train"))
    if schema is Recipe and not isinstance(values.get("training"), dict):
        values["training"] = {}
    return values


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


@dataclass(frozen=True)
class _Problem:
    path: KeyPath
    message: str
    location: KeyPath
    """The key whose line is reported: `path`, or the discriminator inside it."""
    shown: KeyPath
    """The key whose name is reported: `path` if it has a short form, otherwise `location`."""


@dataclass(frozen=True)
class _SchemaKey:
    """A key as written in the recipe, and its position in the schema."""

    path: KeyPath
    section: type[BaseModel]
    """The section that contains the key."""
    variants: Variants | None = None
    """The variants of that section if there are several. `tag` identifies the variant that the recipe uses."""
    tag: str = ""


def _problem(item: Any, values: dict[str, Any], schema: type[BaseModel]) -> _Problem:
    """Convert a pydantic validation error to a problem in the recipe as written."""
    key = _schema_key(item["loc"], values, schema)
    location = shown = key.path
    if item["type"] == "union_tag_invalid":
        location = (*location, item["ctx"]["discriminator"].strip("'"))
        has_short_form = expand(key.section, str(key.path[-1]), "") != ""
        shown = key.path if has_short_form else location
    return _Problem(key.path, _message(item, key, schema), location, shown)


def _schema_key(location: KeyPath, values: Any, schema: type[BaseModel]) -> _SchemaKey:
    """Return the key at pydantic's `location`, which also contains union tags and the keys that a short form expands to."""
    key = _SchemaKey((), schema)
    inside: tuple[type[BaseModel], Variants | None, str] = (schema, None, "")
    parts = iter(location)
    for part in parts:
        if isinstance(values, list):  # a list of sections, or a list as a short form
            if isinstance(part, int):
                key, values = _SchemaKey((*key.path, part), *inside), values[part]
            continue
        if key.path and not isinstance(values, dict):
            break  # a short form, which does not contain the remaining keys
        key = _SchemaKey((*key.path, part), *inside)
        values = values.get(part)
        variants = variants_of(key.section, part)
        if variants is not None:
            tag = str(next(parts, "")) if variants.is_union else ""
            inside = (variants.by_tag.get(tag, variants.default), variants if variants.is_union else None, tag)
    return key


def _message(item: Any, key: _SchemaKey, schema: type[BaseModel]) -> str:
    """Return the message for a pydantic validation error at `key`."""
    path, kind, context = key.path, item["type"], item.get("ctx", {})
    if path == ("kind",):
        return "must be embeddings (omit this key for a language model)"
    if kind == "extra_forbidden":
        return _unknown_key_message(key, schema, item["input"])
    if kind == "missing":
        if path == ("training",):
            return f"missing (set how long to train with one of {', '.join(LENGTHS)})"
        if path == ("data",):
            return "missing (specify the text to train on, for example `data: {train: my.txt}`)"
        return "missing"
    if kind == "value_error":
        hint = hints.number(str(path[-1]) if path else "", item["input"])
        return str(context["error"]) + (f" ({hint})" if hint else "")
    if kind in ("literal_error", "union_tag_invalid"):
        expected = context.get("expected") or context.get("expected_tags", "")
        options = re.findall(r"'([^']*)'", expected)
        given = item["input"] if kind == "literal_error" else context.get("tag")
        hint = _TOKENIZER_HINT if path == ("tokenizer",) and hints.value(given, options) is None else hints.value(given, options)
        expected = f"{'one of ' if len(options) > 1 else ''}{', '.join(options)}"
        return f"must be {expected}, not {show(given)}" + (f" ({hint})" if hint else "")
    if kind in ("model_type", "dict_type", "model_attributes_type"):
        variants = variants_of(key.section, str(path[-1])) if path else None
        known = list((variants.default if variants else key.section).model_fields)
        return f"must be a section with keys such as {', '.join(known[:4])}" + (_TOKENIZER_HINT if path == ("tokenizer",) else "")
    if kind == "union_tag_not_found":
        variants = variants_of(key.section, str(path[-1]))
        tags = ", ".join(variants.by_tag) if variants else ""
        return f"needs the key {str(context['discriminator']).strip(chr(39))} (one of {tags})"
    if kind == "string_type":
        return f"must be text, not {show(item['input'])}"
    return str(item["msg"])


_TOKENIZER_HINT = "{kind: bpe, split: gpt2} trains one like GPT-2's, and {path: tokenizer.json} uses an existing one"


def _unknown_key_message(key: _SchemaKey, schema: type[BaseModel], value: object) -> str:
    """Return the message for an unknown key, which may be misspelled, renamed or in the wrong section."""
    name, known = str(key.path[-1]), list(key.section.model_fields)
    others = key.variants.with_key(name) if key.variants is not None else []
    if key.variants is None or not others:
        return f"unknown key ({_key_hint(key, schema, value) or 'known keys: ' + ', '.join(known)})"
    if key.variants.discriminator is None:
        return f"cannot be combined with {key.tag} (only with {listed(others)})"
    noun = str(key.path[-2]) if key.variants.discriminator == "name" else key.variants.discriminator
    plural = len(others) > 1
    return f"not a key of {noun} {key.tag} ({noun}{'s' * plural} {listed(others)} {'have' if plural else 'has'} it)"


def _key_hint(key: _SchemaKey, schema: type[BaseModel], value: object) -> str | None:
    """Return a hint for an unknown key.

    For an unknown section with a single key, prefer the hint for that key, unless the name of the section looks misspelled.
    """
    path, known = tuple(map(str, key.path)), frozenset(all_keys(schema))
    meant, similar = hints.recipe_key(path, known), did_you_mean(path[-1], key.section.model_fields)
    if isinstance(value, dict) and len(value) == 1 and (meant or not similar):
        inner = (*path, *map(str, value))
        hint = hints.recipe_key(inner, known)
        if hint is not None:
            return hint
    return meant or similar


def _outside_lists(path: KeyPath) -> KeyPath:
    """Return the path of the list that contains the key at `path`, or `path` if no list contains it."""
    return next((path[:depth] for depth, part in enumerate(path) if isinstance(part, int)), path)


def _without(values: Any, paths: set[KeyPath], prefix: KeyPath = ()) -> Any:
    """Return `values` without the keys at `paths`."""
    if isinstance(values, dict):
        return {k: _without(v, paths, (*prefix, k)) for k, v in values.items() if (*prefix, k) not in paths}
    return values


def _dotted(path: KeyPath) -> str:
    """Join a path for a message: ("data", "train", 1, "weight") becomes `data.train[1].weight`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
