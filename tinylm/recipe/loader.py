"""Read a recipe file and tell everything that is wrong with it at once, each with its line.

In: the path of a YAML file (or its text) and `--set` overrides. Out: a `Recipe`. YAML is read by the 1.2 rules people
expect: `3e-4` and `1e6` are numbers, `off` is a word that a flag understands, a key given twice is an error.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from tinylm.errors import InputError, did_you_mean
from tinylm.recipe.checks import contradictions, embedding_contradictions
from tinylm.recipe.embeddings import (
    CbowMethod,
    EmbeddingRecipe,
    GloveMethod,
    SkipGramMethod,
    TokenVocabulary,
    WordVocabulary,
)
from tinylm.recipe.notation import Loader
from tinylm.recipe.schema import (
    AdamWOptimizer,
    BpeTokenizer,
    ByteTokenizer,
    CharTokenizer,
    ConstantSchedule,
    CosineSchedule,
    FileTokenizer,
    HeldoutShare,
    HeldoutSources,
    LinearSchedule,
    MuonOptimizer,
    Recipe,
    WsdSchedule,
)

Path_ = tuple[str | int, ...]


class RecipeError(InputError):
    """Every problem of a recipe, one per line: `file:line: key: what is wrong (what to do)`."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


@dataclass
class _Document:
    """A YAML file as plain values, and where each of its keys was written."""

    name: str
    values: dict[str, Any] = field(default_factory=dict)
    places: dict[Path_, str] = field(default_factory=dict)
    problems: list[tuple[str, str]] = field(default_factory=list)

    @property
    def schema(self) -> type[Recipe] | type[EmbeddingRecipe]:
        """What `kind` says that this is a recipe for."""
        return EmbeddingRecipe if self.values.get("kind") == "embeddings" else Recipe

    def place(self, path: Path_) -> str:
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, self.name)


def load(source: str | Path, overrides: Sequence[str] = (), *, check_files: bool = True) -> Recipe:
    """Read the recipe file `source` with `--set` overrides such as `training.optimizer.lr=3e-4`.

    Without `check_files` the text that it names need not be there (any more).
    Raises `InputError` when the file cannot be read or is for embeddings, and `RecipeError` with every problem found in it.
    """
    return _for_a_model(load_any(source, overrides, check_files=check_files), str(source))


def load_any(source: str | Path, overrides: Sequence[str] = (), *, check_files: bool = True) -> Recipe | EmbeddingRecipe:
    """`load`, for a recipe of any kind."""
    path = Path(source)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 at byte {error.start}", where=str(path), hint="a recipe is a YAML text file") from None
    except OSError as error:
        raise InputError(error.strerror or "cannot be read", where=str(path)) from None
    return loads_any(text, overrides, name=str(path), check_files=check_files)


def loads(text: str, overrides: Sequence[str] = (), *, name: str = "recipe", check_files: bool = True) -> Recipe:
    """The recipe written in `text`; `name` stands for the file in error messages."""
    return _for_a_model(loads_any(text, overrides, name=name, check_files=check_files), name)


def _for_a_model(recipe: Recipe | EmbeddingRecipe, where: str) -> Recipe:
    if isinstance(recipe, EmbeddingRecipe):
        raise InputError(
            "for embeddings, not for a language model", where=where, hint="`tinylm embed --help` lists what they can do"
        )
    return recipe


def loads_any(
    text: str, overrides: Sequence[str] = (), *, name: str = "recipe", check_files: bool = True
) -> Recipe | EmbeddingRecipe:
    """`loads`, for a recipe of any kind."""
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
    """The line in `file:line`; what has none, such as an option, comes last."""
    line = where.rpartition(":")[2]
    return int(line) if line.isdigit() else sys.maxsize


def _parse(text: str, name: str) -> _Document:
    document = _Document(name)
    try:
        loader = Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                raise InputError("the recipe is empty", where=name, hint="`tinylm recipes` lists some to start from")
            if not isinstance(node, yaml.MappingNode):
                kind = "list" if isinstance(node, yaml.SequenceNode) else "single value"
                raise InputError(f"a recipe is a mapping of sections such as `data:` and `training:`, not a {kind}", where=name)
            document.values = _construct(loader, node, (), document)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"{name}:{mark.line + 1}" if mark else name
        problem = error.problem or "not YAML"
        if "'\\t'" in problem:
            raise InputError("a tab cannot indent YAML", where=line, hint="use spaces") from None
        hint = "a value that is a lone - must be quoted" if problem.startswith("sequence entries") else None
        raise InputError(f"not valid YAML: {problem}", where=line, hint=hint) from None
    except (ValueError, TypeError) as error:  # a value that does not fit the tag written before it
        raise InputError(f"not valid YAML: {error}", where=name, hint="a recipe needs no tags such as !!int") from None
    except RecursionError:
        raise InputError(_TOO_LARGE, where=name) from None
    except yaml.YAMLError as error:
        raise InputError(f"not valid YAML: {str(error).splitlines()[0]}", where=name) from None
    return document


def _construct(loader: Loader, node: yaml.Node, path: Path_, document: _Document) -> Any:
    if len(path) > _DEEPEST or len(document.places) > _MOST_KEYS:  # an alias that holds itself, or a bomb of aliases
        raise InputError(_TOO_LARGE, where=f"{document.name}:{node.start_mark.line + 1}")
    if isinstance(node, yaml.MappingNode):
        loader.flatten_mapping(node)
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = f"{document.name}:{key_node.start_mark.line + 1}"
            key = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "?"
            if key in mapping:
                first = document.places[(*path, key)].rpartition(":")[2]
                document.problems.append((line, f"{key} is given twice (first in line {first})"))
                continue
            document.places[(*path, key)] = line
            mapping[key] = _construct(loader, value_node, (*path, key), document)
        return mapping
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            document.places[(*path, index)] = f"{document.name}:{item.start_mark.line + 1}"
        return [_construct(loader, item, (*path, index), document) for index, item in enumerate(node.value)]
    return loader.construct_object(node, deep=True)


def _apply(document: _Document, override: str) -> None:
    key, equals, written = override.partition("=")
    path = tuple(key.strip().split("."))
    where = f"--set {override}"
    if not equals or not all(path):
        document.problems.append((where, "write it as SECTION.KEY=VALUE, like training.steps=100"))
        return
    value = _value_of(written)
    target = document.values
    for depth, part in enumerate(path[:-1], 1):
        if isinstance(target.get(part), str) and part in _SHORT_FORMS:
            target[part] = {_SHORT_FORMS[part]: target[part]}
        if not isinstance(target.get(part), dict):
            target[part] = {}
            document.places[path[:depth]] = where
        target = target[part]
    if path[-1] in _LENGTHS and path[:-1] == ("training",):
        for other in _LENGTHS:
            if not document.places.get((*path[:-1], other), "").startswith("--set"):  # two of them contradict each other
                target.pop(other, None)
    target[path[-1]] = value
    document.places[path] = where


def _inherit(document: _Document) -> None:
    """With `model.init_from`, what `model:` leaves out is as in that run, and so is the tokenizer."""
    model = document.values.get("model")
    given = _mapping(model).get("init_from")
    run = given.get("run") if isinstance(given, dict) else given
    if not isinstance(run, str):
        return
    folder = Path(run).expanduser()
    folder = folder.parent.parent if folder.parent.name == "checkpoints" else folder
    try:
        text = (folder / "recipe.yaml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return  # what is no run is told by the checks
    inherited = _mapping(_parse(text, str(folder / "recipe.yaml")).values.get("model"))
    document.values["model"] = {**inherited, **_mapping(model)}
    document.values.setdefault("tokenizer", {"path": str(folder / "tokenizer.json")})


def _value_of(written: str) -> Any:
    """A YAML scalar, or a list or mapping in brackets; everything else (`-`, `*.txt`, `Note: this`) is text as it stands."""
    try:
        node = yaml.compose(written, Loader)
        outline = isinstance(node, yaml.CollectionNode) and not node.flow_style
        only_a_comment = node is None and written.strip()
        return written if outline or only_a_comment else yaml.load(written, Loader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        return written


_SHORT_FORMS = {"optimizer": "name", "schedule": "name", "tokenizer": "kind", "method": "name", "vocabulary": "kind"}
"""Sections that a lone word may stand for, and the key whose value it is."""
_DEEPEST, _MOST_KEYS = 16, 10_000
_TOO_LARGE = "nested too deeply, or far too large, for a recipe"
_LENGTHS = ("steps", "tokens", "epochs", "minutes")


def _validate(document: _Document, check_files: bool) -> tuple[Recipe | EmbeddingRecipe | None, list[tuple[str, str]]]:
    """Validate; where keys are wrong, leave them out and go on, so that one mistake does not hide another."""
    problems: list[tuple[str, str]] = []
    values = document.values
    wrong: set[Path_] = set()
    for _ in range(20):
        try:
            recipe = document.schema.model_validate(values)
        except ValidationError as error:
            found = _explain(error, values, document)
            problems += [(where, message) for _, where, message in found]
            wrong |= {path for path, _, _ in found}
            values = _without(values, {path for path, _, _ in found})
            if not isinstance(values.get("data"), dict) or not values["data"].get("train"):
                values = {**values, "data": {**_mapping(values.get("data")), "train": "missing"}}
                wrong.add(("data", "train"))
            if document.schema is Recipe:
                if not isinstance(values.get("training", {}), dict):
                    values = {**values, "training": {}}
                values.setdefault("training", {})
            continue
        check = contradictions if isinstance(recipe, Recipe) else embedding_contradictions
        for path, message in check(recipe, check_files):  # type: ignore[arg-type]  # each gets its own kind
            if not any(path[: len(bad)] == bad or bad[: len(path)] == path for bad in wrong):
                problems.append((document.place(path), f"{_dotted(path)}: {message}"))
        return recipe, problems
    return None, problems


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _explain(error: ValidationError, values: dict[str, Any], document: _Document) -> list[tuple[Path_, str, str]]:
    found = []
    for item in error.errors(include_url=False):
        path = _written_path(item["loc"], values)
        message = _message(item, path, document.schema)
        place = (*path, item["ctx"]["discriminator"].strip("'")) if item["type"] == "union_tag_invalid" else path
        found.append((path, document.place(place), f"{_dotted(path)}: {message}"))
    return list({path: entry for path, *_ in found for entry in found if entry[0] == path}.values())


def _written_path(location: Path_, values: Any) -> Path_:
    """Pydantic's location without the union tags it adds and without keys that stand for a short form; a missing key stays."""
    path: Path_ = ()
    parts = iter(location)
    for part in parts:
        if path and not isinstance(values, dict):
            break
        path = (*path, part)
        values = values.get(part)
        if path in _TAGGED:
            next(parts, None)
    return path


_TAGGED: set[Path_] = {
    ("data", "heldout"),
    ("tokenizer",),
    ("training", "optimizer"),
    ("training", "schedule"),
    ("vocabulary",),
    ("method",),
}
_VARIANTS: dict[str, type[BaseModel]] = {
    "muon": MuonOptimizer,
    "adamw": AdamWOptimizer,
    "wsd": WsdSchedule,
    "cosine": CosineSchedule,
    "linear": LinearSchedule,
    "constant": ConstantSchedule,
    "share": HeldoutShare,
    "sources": HeldoutSources,
    "bpe": BpeTokenizer,
    "char": CharTokenizer,
    "byte": ByteTokenizer,
    "file": FileTokenizer,
    "words": WordVocabulary,
    "tokens": TokenVocabulary,
    "skipgram": SkipGramMethod,
    "cbow": CbowMethod,
    "glove": GloveMethod,
}


def _keys_at(location: Path_, schema: type[BaseModel]) -> list[str]:
    """The keys that the schema knows beside the last part of `location`."""
    model = schema
    for part in location[:-1]:
        if part in _VARIANTS:
            model = _VARIANTS[str(part)]
        elif part in model.model_fields:
            model = _section_of(model.model_fields[str(part)].annotation) or model
    return list(model.model_fields)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that an annotation names, the first one of a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((section for part in get_args(annotation) if (section := _section_of(part))), None)


def _message(item: Any, path: Path_, schema: type[BaseModel]) -> str:
    kind, context = item["type"], item.get("ctx", {})
    if path == ("kind",):
        return "must be embeddings, or left out for a language model"
    if kind == "extra_forbidden":
        known = _keys_at(item["loc"], schema)
        hint = did_you_mean(str(path[-1]), known) or f"known here: {', '.join(known)}"
        return f"unknown key ({hint})"
    if kind == "missing":
        if path == ("training",):
            return "missing: say how long to train with one of steps, tokens, epochs, minutes"
        if path and path[-1] == "data":
            return "missing: name the text to learn, like `data: {train: my.txt}`"
        return "missing"
    if kind == "value_error":
        return str(context["error"])
    if kind in ("literal_error", "union_tag_invalid"):
        expected = context.get("expected") or context.get("expected_tags", "")
        options = re.findall(r"'([^']*)'", expected)
        given = item["input"] if kind == "literal_error" else context.get("tag")
        near = did_you_mean(str(given), options)
        return f"must be one of {', '.join(options)}, not {given!r}" + (f" ({near})" if near else "")
    if kind in ("model_type", "dict_type", "model_attributes_type"):
        known = _keys_at((*item["loc"], "?"), schema)
        return f"must be a section with keys such as {', '.join(known[:4])}"
    if kind == "string_type":
        return f"must be a text, not {item['input']!r}"
    return str(item["msg"])


def _without(values: Any, paths: set[Path_], here: Path_ = ()) -> Any:
    if isinstance(values, dict):
        return {k: _without(v, paths, (*here, k)) for k, v in values.items() if (*here, k) not in paths}
    return values


def _dotted(path: Path_) -> str:
    return ".".join(str(part) for part in path)
