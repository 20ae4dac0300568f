"""Architectures and objectives can be registered from outside the library without changing any existing recipe."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import yaml
from toy import ToyObjective, ToySection

from tinylm.errors import InputError
from tinylm.pipeline.resume import merge_for_resume
from tinylm.recipe import (
    ModelVariant,
    Recipe,
    RecipeError,
    load,
    loads,
    register_model_section,
    register_objective_section,
    unregister_section,
)
from tinylm.recipe.schema import (
    DATA_VARIANTS,
    MODEL_VARIANTS,
    OBJECTIVE_VARIANTS,
    CausalLMObjective,
    DecoderSection,
    flattened,
)
from tinylm.recipe.sections import OpenUnion
from tinylm.run import Run

ROOT = Path(__file__).resolve().parent.parent.parent
BASE = "data: {train: my.txt}\ntraining: {steps: 10}\n"
TOY = f"{BASE}model: {{architecture: toy}}\n"
NEW_KEYS = ("model.architecture", "objective.name", "data.format")


@pytest.fixture
def toy() -> Iterator[None]:
    register_model_section(ToySection)
    register_objective_section(ToyObjective)
    yield
    unregister_section(ToyObjective)
    unregister_section(ToySection)


def read(text: str, *overrides: str) -> Recipe:
    return loads(text, overrides, name="my.yaml", check_files=False)


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        read(text, *overrides)
    return caught.value.problems


def choices(variants: OpenUnion) -> str:
    """Return the names of the registered variants as they appear in an error message."""
    return ("one of " if len(variants.sections) > 1 else "") + ", ".join(variants.sections)


def without_new_keys(recipe: Recipe) -> str:
    """Return a recipe as YAML without the keys that did not exist in older versions of tinylm."""
    values = recipe.as_dict()
    del values["model"]["architecture"], values["data"]["format"], values["objective"]
    return yaml.safe_dump(values)


def test_the_default_architecture_is_a_decoder() -> None:
    plain = read(BASE)
    assert type(plain.model) is DecoderSection
    assert plain.objective == CausalLMObjective()
    assert read(BASE, "model.architecture=decoder", "objective=causal_lm", "data.format=text") == plain
    assert {key: flattened(plain.as_dict())[key] for key in NEW_KEYS} == dict(
        zip(NEW_KEYS, ("decoder", "causal_lm", "text"), strict=True)
    )


@pytest.mark.parametrize("objective", ["causal_lm", "{name: causal_lm}", "{}"])
def test_an_objective_can_be_a_name_or_a_section(objective: str) -> None:
    assert read(f"{BASE}objective: {objective}\n") == read(BASE)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_included_recipes_survive_a_round_trip(path: Path) -> None:
    recipe = load(path, check_files=False)
    assert loads(recipe.to_yaml(), check_files=False) == recipe
    if recipe.model.architecture == "decoder" and recipe.data.format == "text":
        assert loads(without_new_keys(recipe), check_files=False) == recipe


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "model: {\n  architecture: decodr}",
            "my.yaml:4: model.architecture: must be {architectures}, not 'decodr' (did you mean decoder?)",
        ),
        ("model: {\n  architecture: zzz}", "my.yaml:4: model.architecture: must be {architectures}, not 'zzz'"),
        ("objective: causal_ml", "my.yaml:3: objective: must be {objectives}, not 'causal_ml' (did you mean causal_lm?)"),
        ("objective: {\n  name: zzz}", "my.yaml:4: objective: must be {objectives}, not 'zzz'"),
        (
            "objective: {\n  share: 0.1}",
            "my.yaml:4: objective.share: unknown key (known keys: name, mask_prompt, teacher, teacher_weight)",
        ),
    ],
)
def test_unknown_architectures_and_objectives_are_rejected(line: str, expected: str) -> None:
    names = {"architectures": choices(MODEL_VARIANTS), "objectives": choices(OBJECTIVE_VARIANTS)}
    assert problems(f"{BASE}{line}\n") == [expected.format(**names)]


def test_unknown_formats_are_rejected() -> None:
    assert problems("data:\n  train: a\n  format: txt\ntraining: {steps: 1}\n") == [
        f"my.yaml:3: data.format: must be {choices(DATA_VARIANTS)}, not 'txt' (did you mean text?)"
    ]


@pytest.mark.usefixtures("toy")
def test_a_registered_architecture_loads_with_its_keys_and_survives_a_round_trip() -> None:
    recipe = read(TOY, "model.n_states=3", "model.forgetting=0.25")
    assert recipe.model == ToySection(context_length=16, n_states=3, forgetting=0.25)
    assert recipe.model.uses_dropout
    assert yaml.safe_load(recipe.to_yaml())["model"] == {
        "architecture": "toy",
        "context_length": 16,
        "n_states": 3,
        "forgetting": 0.25,
    }
    assert loads(recipe.to_yaml(), check_files=False) == recipe
    assert type(read(BASE).model) is DecoderSection


@pytest.mark.usefixtures("toy")
def test_the_default_objective_of_a_registered_architecture_is_its_first_objective() -> None:
    assert read(TOY).objective == ToyObjective()
    assert read(TOY, "objective.share=0.5").objective == ToyObjective(share=0.5)
    assert read(TOY, "objective=causal_lm").objective == CausalLMObjective()
    assert read(BASE).objective == CausalLMObjective()
    assert problems(BASE, "objective=toy_lm") == [
        "--set objective=toy_lm: objective: the decoder architecture cannot be trained with toy_lm, only with causal_lm, dpo and "
        "classification (set model.architecture: toy)"
    ]
    [problem] = problems(BASE, "objective=masked_lm")
    assert problem.endswith("(set model.architecture: encoder)")


def test_an_objective_can_list_the_architectures_that_it_supports() -> None:
    class DecoderObjective(ToyObjective):
        architectures = ("decoder",)

    register_objective_section(DecoderObjective)
    try:
        assert read(BASE, "objective=toy_lm").objective == DecoderObjective()
    finally:
        unregister_section(DecoderObjective)


@pytest.mark.usefixtures("toy")
def test_mistakes_in_the_keys_of_a_registered_architecture_are_reported_with_their_lines() -> None:
    text = f"{BASE}model:\n  architecture: toy\n  prune: [0]\n  n_state: 3\n  forgetting: 1\nobjective:\n  shore: 1\n"
    assert problems(text) == [
        "my.yaml:5: model.prune: not a key of architecture toy (architecture ngram has it)",
        "my.yaml:6: model.n_state: unknown key (did you mean n_states?)",
        "my.yaml:7: model.forgetting: must be a share of at least 0 and below 1, not 1",
        "my.yaml:9: objective.shore: unknown key (did you mean share?)",
    ]
    assert problems(BASE, "model.n_states=2") == [
        "--set model.n_states=2: model.n_states: not a key of architecture decoder (architecture toy has it)"
    ]
    assert problems(f"{BASE}model:\n  architecture: tyo\n") == [
        f"my.yaml:4: model.architecture: must be {choices(MODEL_VARIANTS)}, not 'tyo' (did you mean toy?)"
    ]


@pytest.mark.usefixtures("toy")
def test_conflicts_between_keys_of_a_registered_architecture_are_reported() -> None:
    assert problems(f"{BASE}model:\n  architecture: toy\n  n_states: 17\n") == [
        "my.yaml:5: model.n_states: 17 states exceed the context_length 16"
    ]
    assert problems(TOY, "evaluation.stride=17")[0].startswith(
        "--set evaluation.stride=17: evaluation.stride: must be at most context_length 16"
    )
    assert problems(TOY, "training.lora={}")[0].startswith(
        "--set training.lora={}: training.lora: requires a trained model to adapt"
    )


@pytest.mark.usefixtures("toy")
def test_the_reference_lists_a_registered_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "scripts"))
    page: str = importlib.import_module("recipe_reference").page()
    assert f"The key `architecture` selects one of: {', '.join(f'`{name}`' for name in MODEL_VARIANTS.sections)}." in page
    assert "toy" in MODEL_VARIANTS.sections
    assert "**toy**: A model with a few states." in page
    assert "| `n_states` | Number of states in the toy model. | `4` | a whole number of at least 1 |" in page
    assert "| `share` | The share of tokens that the toy objective predicts. | `0.15` | a share of at least 0 and below 1 |" in page


@pytest.mark.usefixtures("toy")
def test_an_architecture_can_be_registered_only_once() -> None:
    with pytest.raises(ValueError, match="architecture toy already exists"):
        register_model_section(ToySection)
    with pytest.raises(ValueError, match="architecture decoder already exists"):
        register_model_section(DecoderSection)


def test_an_architecture_requires_a_context_length() -> None:
    class WithoutContext(ModelVariant):
        architecture: Literal["short"] = "short"

    with pytest.raises(ValueError, match="WithoutContext needs the key context_length"):
        register_model_section(WithoutContext)


def test_an_unregistered_architecture_is_rejected() -> None:
    register_model_section(ToySection)
    unregister_section(ToySection)
    assert problems(TOY) == [f"my.yaml:3: model.architecture: must be {choices(MODEL_VARIANTS)}, not 'toy'"]


def run_folder(folder: Path, text: str) -> Run:
    """Create a run folder that contains only a recipe."""
    folder.mkdir()
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    return Run(folder)


def test_a_run_created_before_the_architecture_key_existed_can_be_loaded_and_resumed(tmp_path: Path) -> None:
    recipe = read(BASE, "model.n_layer=2", "training.precision=fp32")
    run = run_folder(tmp_path / "old", without_new_keys(recipe))
    assert run.recipe == recipe
    assert merge_for_resume(run, recipe, ()) == recipe


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (TOY, BASE, "model.architecture cannot change from toy to decoder when a run is resumed"),
        (TOY, f"{TOY}objective: causal_lm\n", "objective.name cannot change from toy_lm to causal_lm when a run is resumed"),
    ],
)
def test_a_resumed_run_keeps_its_architecture_and_objective_regardless_of_allowed_changes(
    before: str, after: str, expected: str, tmp_path: Path
) -> None:
    run = run_folder(tmp_path / "run", before)
    for allowed in ((), ("model", "objective"), ("model.architecture", "objective.name")):
        with pytest.raises(InputError) as caught:
            merge_for_resume(run, read(after), allowed)
        assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("run", "hint"),
    [
        ("runs/masked-docs", "runs/masked-docs: no such run (train it first with `tinylm train masked-docs`)"),
        ("a/quickstart", "a/quickstart: no such run (train it first with `tinylm train quickstart --out a/quickstart`)"),
        ("runs/other", "runs/other: no such run"),
    ],
)
def test_a_missing_run_with_the_name_of_a_shipped_recipe_is_reported_with_the_command_that_trains_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: str, hint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as caught:
        loads(f"data: {{train: builtin:license}}\nmodel: {{init_from: {run}}}\ntraining: {{steps: 1}}\n", name="my.yaml")
    assert str(caught.value).splitlines() == [f"my.yaml:2: model.init_from: {hint}"]


@pytest.mark.parametrize(("length", "burn_in"), [(16, 16), (128, 32)])
def test_the_default_burn_in_is_at_most_the_context_length(length: int, burn_in: int) -> None:
    text = f"data: {{train: my.txt}}\nmodel: {{architecture: gru, context_length: {length}}}\ntraining: {{steps: 1}}\n"
    recipe = loads(text, check_files=False)
    assert recipe.model.burn_in == burn_in  # type: ignore[attr-defined]
    assert loads(recipe.to_yaml(), check_files=False) == recipe


@pytest.mark.usefixtures("toy")
def test_init_from_inherits_the_architecture_and_rejects_a_different_one(tmp_path: Path) -> None:
    run_folder(tmp_path / "base", read(BASE, "model.n_layer=2").to_yaml())
    start = f"{BASE}model:\n  init_from: {tmp_path}/base\n"
    assert read(start).model.n_layer == 2
    vectors = ("model.init_embeddings=vectors.txt", "model.freeze_embeddings=true", "model.tie_embeddings=false")
    run_folder(tmp_path / "vectors", read(BASE, *vectors).to_yaml())
    assert read(f"{BASE}model:\n  init_from: {tmp_path}/vectors\n").model.init_embeddings is None  # stored in the weights
    assert problems(f"{start}  architecture: toy\n")[0] == (
        f"my.yaml:4: model.init_from: the architecture of {tmp_path}/base is decoder, not toy"
    )
