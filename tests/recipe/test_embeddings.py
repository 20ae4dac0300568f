"""In embedding recipes, every key survives a round trip, and every problem is reported with its line number."""

from __future__ import annotations

import pytest
from keys import leaves

from tinylm.errors import InputError
from tinylm.recipe import EmbeddingRecipe, RecipeError, changes, load_any, loads, loads_any

BASE = "kind: embeddings\ndata: {train: my.txt}\n"
TOKENS = "vocabulary={kind: tokens, tokenizer: t.json}"

# The overrides that set each key. The last override sets the key to a non-default value.
SETTINGS: dict[str, list[str]] = {
    "EmbeddingRecipe.name": ["name=other"],
    "EmbeddingRecipe.seed": ["seed=7"],
    "EmbeddingDataSection.train": ["data.train=[a.txt, b.txt]"],
    "EmbeddingDataSection.field": ["data.field=body"],
    "EmbeddingDataSection.errors": ["data.errors=replace"],
    "EmbeddingDataSection.template": ["data.template='{title}: {body}'"],
    "WordVocabulary.kind": [TOKENS, "vocabulary=words"],
    "WordVocabulary.lowercase": ["vocabulary.lowercase=off"],
    "WordVocabulary.min_count": ["vocabulary.min_count=2"],
    "WordVocabulary.max_size": ["vocabulary.max_size=1e3"],
    "TokenVocabulary.kind": [TOKENS],
    "TokenVocabulary.tokenizer": [TOKENS, "vocabulary.tokenizer=other.json"],
    "TokenVocabulary.min_count": [TOKENS, "vocabulary.min_count=3"],
    "SkipGramMethod.name": ["method=cbow", "method=skipgram"],
    "CbowMethod.name": ["method=cbow"],
    "GloveMethod.name": ["method=glove"],
    "GloveMethod.dimensions": ["method=glove", "method.dimensions=50"],
    "GloveMethod.window": ["method=glove", "method.window=4"],
    "GloveMethod.x_max": ["method=glove", "method.x_max=10"],
    "GloveMethod.alpha": ["method=glove", "method.alpha=1"],
    "GloveMethod.lr": ["method=glove", "method.lr=0.1"],
    "GloveMethod.epochs": ["method=glove", "method.epochs=2"],
    "GloveMethod.buffer_megabytes": ["method=glove", "method.buffer_megabytes=64"],
    "WatchSection.probes": ["watch.probes=[one, two]"],
    "WatchSection.neighbours": ["watch.neighbours=3"],
    "WatchSection.every": ["watch.every=0.5"],
    "EmbeddingCheckpointSection.every": ["checkpoint.every=0.5"],
}
_WORD2VEC = {
    "dimensions": 50,
    "window": 3,
    "negatives": 2,
    "exponent": 0.5,
    "subsample": 0,
    "lr": 0.1,
    "lr_end": 0,
    "epochs": 1,
}
for _name in ("SkipGram", "Cbow"):
    for _key, _value in _WORD2VEC.items():
        SETTINGS[f"{_name}Method.{_key}"] = [f"method={_name.lower()}", f"method.{_key}={_value}"]


def read(*settings: str) -> EmbeddingRecipe:
    recipe = loads_any(BASE, settings, check_files=False)
    assert isinstance(recipe, EmbeddingRecipe)
    return recipe


def test_every_key_in_the_schema_is_tested() -> None:
    assert set(leaves(EmbeddingRecipe)) - {"EmbeddingRecipe.kind"} == set(SETTINGS)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_every_key_survives_a_round_trip(settings: list[str]) -> None:
    recipe = read(*settings)
    path = settings[-1].partition("=")[0]
    changed = changes(read(*settings[:-1]), recipe)
    assert any(key == path or key.startswith(f"{path}.") for key in changed), "the key has no effect"
    assert loads_any(recipe.to_yaml(), check_files=False) == recipe


def test_the_defaults_match_the_original_papers() -> None:
    skipgram, cbow, glove = (read(f"method={name}").method for name in ("skipgram", "cbow", "glove"))
    assert (skipgram.window, skipgram.negatives, skipgram.exponent, skipgram.subsample) == (5, 5, 0.75, 1e-3)  # type: ignore[union-attr]
    assert (skipgram.lr, skipgram.lr_end, cbow.lr, skipgram.epochs) == (0.025, 1e-4, 0.05, 5)  # type: ignore[union-attr]
    assert (glove.window, glove.x_max, glove.alpha, glove.lr) == (15, 100, 0.75, 0.05)  # type: ignore[union-attr]


def test_all_problems_are_reported_with_their_lines() -> None:
    text = """\
kind: embeddings
data: {trian: my.txt}
vocabulary: {min_cont: 3}
method:
  name: skipgram
  window: -2
  lr_end: 3
  x_max: 7
watch: 5
training: {steps: 3}
"""
    with pytest.raises(RecipeError) as caught:
        loads_any(text, name="v.yaml", check_files=False)
    assert caught.value.problems == [
        "v.yaml:2: data.train: missing",
        "v.yaml:2: data.trian: unknown key (did you mean train?)",
        "v.yaml:3: vocabulary.min_cont: unknown key (did you mean min_count?)",
        "v.yaml:6: method.window: must be a whole number of at least 1, not -2",
        "v.yaml:7: method.lr_end: must be at most lr 0.025, not 3 (the learning rate decays from lr)",
        "v.yaml:8: method.x_max: not a key of method skipgram (method glove has it)",
        "v.yaml:9: watch: must be a section with keys such as probes, neighbours, every",
        "v.yaml:10: training: unknown key (known keys: kind, name, seed, data, vocabulary, method, watch, checkpoint)",
    ]


def test_an_unknown_kind_and_a_recipe_of_the_wrong_kind_are_rejected() -> None:
    with pytest.raises(RecipeError, match="kind: must be embeddings \\(omit this key for a language model"):
        loads("kind: embedings\ndata: {train: my.txt}\ntraining: {steps: 1}\n", check_files=False)
    with pytest.raises(InputError, match="for embeddings, not for a language model"):
        loads(BASE, check_files=False)
    with pytest.raises(RecipeError, match=r"recipe:2: data\.train: my\.txt: no such file"):
        loads_any(BASE)
    with pytest.raises(InputError, match="No such file"):
        load_any("nowhere.yaml")
