"""Write docs/recipe.md, every key of a recipe, from the schema: python docs/make_reference.py

A key's meaning is the sentence that stands under it in tinylm/recipe/schema.py and embeddings.py; what it may be is what its error
message says would have been right.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticUndefined

from tinylm.recipe import embeddings, schema
from tinylm.recipe.presets import PRESETS
from tinylm.recipe.schema import ModelSection, Section, plain

DOCS = Path(__file__).parent
LANGUAGE_MODEL: dict[str, tuple[type[Section], ...]] = {
    "": (schema.Recipe,),
    "data": (schema.DataSection,),
    "data.heldout": (schema.HeldoutShare, schema.HeldoutSources),
    "tokenizer": (*schema.LEARNED, schema.FileTokenizer),
    "model": (ModelSection,),
    "model.init_from": (schema.InitFrom,),
    "training": (schema.TrainingSection,),
    "training.optimizer": (schema.MuonOptimizer, schema.AdamWOptimizer),
    "training.schedule": (schema.WsdSchedule, schema.CosineSchedule, schema.LinearSchedule, schema.ConstantSchedule),
    "training.lora": (schema.LoraSection,),
    "training.guards": (schema.GuardsSection,),
    "evaluation": (schema.EvaluationSection,),
    "checkpoint": (schema.CheckpointSection,),
    "sampling": (schema.SamplingSection,),
}
EMBEDDINGS: dict[str, tuple[type[Section], ...]] = {
    "": (embeddings.EmbeddingRecipe,),
    "data": (embeddings.EmbeddingDataSection,),
    "vocabulary": (embeddings.WordVocabulary, embeddings.TokenVocabulary),
    "method": (embeddings.SkipGramMethod, embeddings.CbowMethod, embeddings.GloveMethod),
    "watch": (embeddings.WatchSection,),
    "checkpoint": (embeddings.EmbeddingCheckpointSection,),
}


def meanings(section: type[Section]) -> dict[str, str]:
    """The sentence under each key, those of the classes it builds on included."""
    found: dict[str, str] = {}
    for kind in reversed(section.__mro__):
        if not issubclass(kind, Section):
            continue
        (body,) = ast.parse(inspect.getsource(kind)).body
        assert isinstance(body, ast.ClassDef)
        for key, below in zip(body.body, body.body[1:], strict=False):
            if not isinstance(key, ast.AnnAssign) or not isinstance(below, ast.Expr):
                continue
            if isinstance(key.target, ast.Name) and isinstance(below.value, ast.Constant):
                found[key.target.id] = " ".join(str(below.value.value).replace("|", "\\|").split())
    return found


def allowed(annotation: Any) -> str:
    """What a key may be, in the words of its error message."""
    if get_origin(annotation) is Literal:
        return ", ".join(map(str, get_args(annotation)))
    try:
        TypeAdapter(annotation).validate_python(object())
    except ValidationError as error:
        expected = re.search(r"must be (.*), not <object", error.errors()[0]["msg"])
        return expected[1] if expected else "a text" if annotation is str else ""
    raise AssertionError(annotation)


def default(section: type[Section], key: str) -> str:
    """As a recipe has it; by preset, where presets differ."""
    if section is ModelSection and key in PRESETS["modern"]:
        values = {preset: written(parts[key]) for preset, parts in PRESETS.items()}
        alike = len(set(values.values())) == 1
        return values["modern"] if alike else ", ".join(f"{preset} {value}" for preset, value in values.items())
    field = section.model_fields[key]
    return "required" if field.is_required() else "" if field.default is PydanticUndefined else written(field.default)


def written(value: Any) -> str:
    if isinstance(value, Section):
        return name_of(type(value)) or ""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) and value else json.dumps(plain(value))


def name_of(section: type[Section]) -> str | None:
    """What chooses this kind of a section: `name` or `kind`, where it can only be one word."""
    for key in ("name", "kind"):
        field = section.model_fields.get(key)
        if field is not None and get_origin(field.annotation) is Literal:
            return str(get_args(field.annotation)[0])
    return None


def table(place: str, section: type[Section], links: dict[str, str]) -> list[str]:
    """A row for each key."""
    meaning, lines = meanings(section), []
    for key, field in section.model_fields.items():
        annotation = field.rebuild_annotation()
        if get_origin(annotation) is Literal and len(get_args(annotation)) == 1:
            continue  # the name of the section itself
        path = f"{place}.{key}" if place else key
        may_be = links.get(path) or allowed(annotation)
        lines.append(f"| `{key}` | {default(section, key)} | {may_be} | {meaning.get(key, '')} |")
    return ["| key | default | may be | |", "|---|---|---|---|", *lines, ""] if lines else []


def chapter(sections: dict[str, tuple[type[Section], ...]], before: Iterable[str] = ()) -> list[str]:
    """`before`: sections of the chapters before, whose headings are the same."""
    slugs = {place: place.replace(".", "") + ("-1" if place in before else "") for place in sections}
    links = {place: f"[a section](#{slug})" for place, slug in slugs.items()}
    lines: list[str] = []
    for place, kinds in sections.items():
        lines += [f"### {place}", ""] if place else []
        for kind in kinds:
            name = name_of(kind) if len(kinds) > 1 else None
            about = inspect.cleandoc(kind.__dict__.get("__doc__") or "")
            lines += [f"**{name}**: {about}" if name else about, "", *table(place, kind, links)]
    return lines


def page() -> str:
    lines = [
        "# Every key of a recipe",
        "",
        "Made from the schema by `python docs/make_reference.py`. `--set SECTION.KEY=VALUE` changes one on the command line. A key",
        "that is not here is refused.",
        "",
        "## Language models",
        "",
        *chapter(LANGUAGE_MODEL),
        "## Embeddings (`kind: embeddings`)",
        "",
        *chapter(EMBEDDINGS, LANGUAGE_MODEL),
    ]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


if __name__ == "__main__":
    (DOCS / "recipe.md").write_text(page(), encoding="utf-8")
