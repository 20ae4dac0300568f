"""Recipes accept values in every common notation, and all problems in a recipe are reported at once with line numbers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from keys import sections_of
from pydantic import BaseModel

from tinylm.errors import InputError
from tinylm.recipe import EmbeddingRecipe, Recipe, RecipeError, load, loads
from tinylm.recipe.schema import AdamWOptimizer, BpeTokenizer, CosineSchedule, HeldoutShare, flattened
from tinylm.recipe.sections import variants_of

SMALLEST = "data: {train: my.txt}\ntraining: {steps: 10}\n"


def read(text: str, *overrides: str) -> Recipe:
    return loads(text, overrides, name="my.yaml", check_files=False)


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        read(text, *overrides)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


def error_message(text: str) -> str:
    with pytest.raises(InputError) as caught:
        read(text)
    return str(caught.value)


@pytest.mark.parametrize(
    ("written", "expected"),
    [("3e-4", 3e-4), ("3E-4", 3e-4), (".5", 0.5), ("5.", 5.0), ("1e0", 1.0), ("0.0_3", 0.03), ("+1e-1", 0.1), ("2", 2.0)],
)
def test_floats_are_accepted_in_every_common_notation(written: str, expected: float) -> None:
    assert read(f"{SMALLEST[:-2]}, optimizer: {{lr: {written}}}}}").training.optimizer.lr == expected


@pytest.mark.parametrize(("written", "expected"), [("1e6", 1_000_000), ("1_000", 1000), ("2.5e3", 2500), ("010", 10)])
def test_integers_are_accepted_in_every_common_notation(written: str, expected: int) -> None:
    tokens = read(f"data: {{train: a}}\ntraining: {{tokens: {written}}}").training.tokens
    assert tokens == expected
    assert isinstance(tokens, int)


@pytest.mark.parametrize(
    ("written", "expected"), [("off", False), ("on", True), ("no", False), ("Yes", True), ("TRUE", True), ("false", False)]
)
def test_booleans_accept_true_on_yes_and_their_opposites(written: str, expected: bool) -> None:
    assert read(f"{SMALLEST}model: {{bias: {written}}}").model.bias is expected
    assert read(SMALLEST, f"training.compile={written}").training.compile is expected


@pytest.mark.parametrize("written", ["off", "false", "null", "no", ""])
def test_gradient_clipping_can_be_disabled(written: str) -> None:
    assert read(SMALLEST, f"training.clip_grad_norm={written}").training.clip_grad_norm is None


def test_strings_that_yaml_1_1_would_convert_stay_strings() -> None:
    recipe = read(f"name: 2024-01-02\n{SMALLEST}sampling: {{every: 5, prompts: [no, 12:30, 1e, 0x1F]}}")
    assert recipe.name == "2024-01-02"
    assert recipe.sampling.prompts == ("no", "12:30", "1e", "0x1F")


def test_short_forms_expand_to_sections() -> None:
    recipe = read(
        "data: {train: a, heldout: 0.25}\ntokenizer: {vocab_size: 300}\ntraining: {epochs: 1, optimizer: adamw, schedule: cosine}\n"
    )
    assert recipe.data.heldout == HeldoutShare(share=0.25, by="tail")
    assert recipe.tokenizer == BpeTokenizer(kind="bpe", vocab_size=300)
    assert isinstance(recipe.training.optimizer, AdamWOptimizer)
    assert isinstance(recipe.training.schedule, CosineSchedule)


def test_optimizer_auto_is_the_default_optimizer() -> None:
    assert read(SMALLEST, "training.optimizer=auto") == read(SMALLEST)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "my.yaml: the recipe is empty (`tinylm recipes` lists recipes to start from)"),
        ("# nothing but a comment\n", "my.yaml: the recipe is empty (`tinylm recipes` lists recipes to start from)"),
        ("- a\n- b\n", "my.yaml: a recipe must be a mapping of sections such as `data:` and `training:`, not a list"),
        ("hello", "my.yaml: a recipe must be a mapping of sections such as `data:` and `training:`, not a single value"),
        ("data:\n\ttrain: a\n", "my.yaml:2: YAML cannot be indented with tabs (use spaces)"),
        ("name: x\ndata: {train: a\ntraining: [\n", "my.yaml:3: not valid YAML"),
        ("name: a\n---\nname: b\n", "my.yaml:2: not valid YAML"),
        ("name: a\x00b\n", "my.yaml: not valid YAML: unacceptable character #x0000: special characters are not allowed"),
        ("name: !!python/name:os.getcwd ''\n", "my.yaml:1: not valid YAML"),
    ],
)
def test_text_that_is_not_a_recipe_produces_a_one_line_error(text: str, expected: str) -> None:
    message = error_message(text)
    assert message.startswith(expected)
    assert "\n" not in message


def test_a_recursive_alias_is_rejected() -> None:
    assert "my.yaml:1: nested too deeply" in error_message("data: &a {train: *a}\n")


def test_the_error_for_a_missing_or_binary_file_includes_its_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.yaml: No such file"):
        load(tmp_path / "none.yaml")
    (tmp_path / "image.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(InputError, match=r"image\.yaml: not UTF-8 at byte 6"):
        load(tmp_path / "image.yaml")


def test_the_error_for_a_duplicate_key_contains_both_lines() -> None:
    assert problems(f"name: a\n{SMALLEST}name: b\n") == ["my.yaml:4: name is set twice (first on line 1)"]
    assert problems("data: {train: a}\ntraining:\n  steps: 1\n  steps: 2\n") == ["my.yaml:4: steps is set twice (first on line 3)"]


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("modle", "{}", "modle: unknown key (did you mean model?)"),
        ("model", "{\n  n_layers: 3}", "model.n_layers: unknown key (did you mean n_layer?)"),
        ("tokenizer", "{\n  kind: bpe,\n  vocabsize: 3}", "tokenizer.vocabsize: unknown key (did you mean vocab_size?)"),
        (
            "tokenizer",
            "{\n  kind: char,\n  vocab_size: 3}",
            "tokenizer.vocab_size: not a key of kind char (kinds bpe, unigram, wordpiece and word have it)",
        ),
        ("sampling", "{\n  every: 3,\n\n  promts: a}", "sampling.promts: unknown key (did you mean prompts?)"),
        ("model", "{\n  preset: gpt-2}", "model.preset: must be one of modern, gpt2, llama, not 'gpt-2' (did you mean gpt2?)"),
        ("model", "{\n  n_layer: 0}", "model.n_layer: must be a whole number of at least 1, not 0"),
        ("model", "{\n  n_layer: -2}", "model.n_layer: must be a whole number of at least 1, not -2"),
        ("model", "{\n  n_layer: 2.5}", "model.n_layer: must be a whole number of at least 1, not 2.5"),
        ("model", "{\n  n_layer: six}", "model.n_layer: must be a whole number of at least 1, not 'six'"),
        ("model", "{\n  n_layer: true}", "model.n_layer: must be a whole number of at least 1, not True"),
        ("model", "{\n  n_layer: [2]}", "model.n_layer: must be a whole number of at least 1, not [2]"),
        ("model", "{\n  n_layer: }", "model.n_layer: must be a whole number of at least 1, not null"),
        ("model", "{\n  bias: maybe}", "model.bias: must be true or false, not 'maybe'"),
        ("model", "{\n  bias: 1}", "model.bias: must be true or false, not 1"),
        ("model", "{\n  dropout: 1.0}", "model.dropout: must be a share of at least 0 and below 1, not 1.0"),
        ("model", "{\n  logit_softcap: .inf}", "model.logit_softcap: must be a number above 0, or null, not '.inf'"),
        ("seed", "-1", "seed: must be a whole number from 0 to 2^63 - 1, not -1"),
        ("seed", "1e30", "seed: must be a whole number from 0 to 2^63 - 1, not 1e+30"),
        ("name", "5", "name: must be text, not 5"),
        ("model", "gpt2", "model: must be a section with keys such as architecture, preset, n_layer, n_head"),
        ("tokenizer", "5", "tokenizer: must be a section with keys such as kind, normalize, special_tokens"),
        (
            "tokenizer",
            "bqe",
            "tokenizer: must be one of bpe, unigram, wordpiece, word, char, byte, file, not 'bqe' (did you mean bpe?)",
        ),
        (
            "tokenizer",
            "{\n  vocab_size: 9,\n  kind: bqe}",
            "tokenizer: must be one of bpe, unigram, wordpiece, word, char, byte, file, not 'bqe'",
        ),
    ],
)
def test_an_invalid_key_or_value_is_reported_with_its_line(key: str, value: str, expected: str) -> None:
    (problem,) = problems(f"{SMALLEST}\n{key}: {value}\n")
    line = 4 + value.count("\n")  # the mistake is always on the last line
    assert problem.startswith(f"my.yaml:{line}: {expected}")


@pytest.mark.parametrize(
    ("heldout", "expected"),
    [
        ("{share: 0.2,\n by: tial}", "my.yaml:2: data.heldout.by: must be one of document, tail, not 'tial' (did you mean tail?)"),
        ("{by: tail,\n share: 1.5}", "my.yaml:2: data.heldout.share: must be a share above 0 and below 1, not 1.5"),
        ("{share: 0.1,\n shar: 0.1}", "my.yaml:2: data.heldout.shar: unknown key (did you mean share?)"),
        ("{sources: b,\n by: tail}", "my.yaml:2: data.heldout.by: cannot be combined with sources (only with share)"),
        ("[a, 5]", "my.yaml:1: data.heldout: must be a SOURCE"),
        ("1.5", "my.yaml:1: data.heldout: must be a share above 0 and below 1, not 1.5"),
        ("true", "my.yaml:1: data.heldout: must be a section with keys such as share, by"),
    ],
)
def test_an_invalid_heldout_section_is_reported_with_its_key_and_line(heldout: str, expected: str) -> None:
    (problem,) = problems(f"data: {{train: a, heldout: {heldout}}}\ntraining: {{steps: 1}}\n")
    assert problem.startswith(expected)


def test_invalid_keys_in_an_optimizer_or_schedule_are_reported_with_their_lines() -> None:
    text = """\
data: {train: a}
training:
  steps: 100
  optimizer:
    name: adamw
    momentum: 0.9
    betas: [0.9, 1.0]
  schedule:
    name: cosine
    cooldown: 0.5
    floor: 2
"""
    assert sorted(problems(text)) == sorted(
        [
            "my.yaml:6: training.optimizer.momentum: not a key of optimizer adamw (optimizer muon has it)",
            "my.yaml:7: training.optimizer.betas: must be two numbers of at least 0 and below 1, like [0.9, 0.95], not [0.9, 1.0]",
            "my.yaml:10: training.schedule.cooldown: not a key of schedule cosine (schedule wsd has it)",
            "my.yaml:11: training.schedule.floor: must be a share between 0 and 1, not 2",
        ]
    )


def test_all_problems_are_reported_at_once_including_conflicts_between_keys() -> None:
    text = """\
name: 7
data:
  train: my.txt
  feild: body
model:
  n_head: 5
  n_embd: 64
training:
  steps: 10
  tokens: 1e6
  global_batch_size: 64
  micro_batch_size: 24
  schedule: {warmup: 50}
evaluation: {every: -3}
name: again
"""
    assert sorted(problems(text), key=lambda problem: int(problem.split(":")[1])) == [
        "my.yaml:1: name: must be text, not 7",
        "my.yaml:4: data.feild: unknown key (did you mean field?)",
        "my.yaml:6: model.n_head: the width n_embd 64 is not divisible by 5 heads (4 heads would work)",
        "my.yaml:10: training.tokens: only one of steps, tokens, epochs, minutes can be set, and steps is set",
        "my.yaml:12: training.micro_batch_size: 24 does not divide global_batch_size 64 (16 or 32 would)",
        "my.yaml:13: training.schedule.warmup: 50 warmup steps exceed the 10 training steps",
        "my.yaml:14: evaluation.every: must be a whole number of at least 1, or a share below 1 of the training run, not -3",
        "my.yaml:15: name is set twice (first on line 1)",
    ]


def test_a_misspelled_key_is_not_also_reported_as_missing() -> None:
    assert problems("data: {train: a}\ntraining: {stesp: 10}\n") == ["my.yaml:2: training.stesp: unknown key (did you mean steps?)"]
    assert problems("data: {train: a}\ntraining: {steps: none}\n") == [
        "my.yaml:2: training.steps: must be a whole number of at least 1, or null, not 'none'"
    ]
    assert problems("data: {train: []}\ntraining: {steps: 1}\n") == [
        "my.yaml:1: data.train: must be a SOURCE (a file, folder, glob, URL or builtin:NAME) or a list of them, not []"
    ]


def test_the_error_for_a_missing_section_shows_what_to_write() -> None:
    assert problems("name: x\n") == [
        "my.yaml: data: missing (specify the text to train on, for example `data: {train: my.txt}`)",
        "my.yaml: training: missing (set how long to train with one of steps, tokens, epochs, minutes)",
    ]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["model.n_embd=15", "model.n_head=5"], "rope needs an even head width, and n_embd / n_head is 3"),
        (["model.n_kv_head=4"], "n_head 6 is not divisible by 4 key/value heads"),
        (["model.position=sinusoidal", "model.n_embd=15", "model.n_head=5"], "sinusoidal positions need an even width"),
        (["model.rope_theta=1e4", "model.preset=gpt2"], "needs position: rope, not learned"),
        (["tokenizer.vocab_size=256"], "must be at least 257 for bpe (the 256 bytes and the end-of-text token), not 256"),
        (
            ["tokenizer.special_tokens=a", "tokenizer.added_tokens=[b, a]"],
            "'a' is also in special_tokens (remove it from one of them)",
        ),
        (["tokenizer.added_tokens=<|endoftext|>"], "<|endoftext|> is always in the vocabulary (remove it)"),
        (["tokenizer.byte_fallback=off"], "can only be off if alphabet is not bytes"),
        (["tokenizer.kind=unigram", "tokenizer.alphabet=bytes"], "unigram works on characters"),
        (
            ["tokenizer.vocab_size=258", "tokenizer.special_tokens=[a, b]"],
            "must be at least 259 for bpe (the 256 bytes, the end-of-text token and the special and added tokens), not 258",
        ),
        (["training.micro_batch_size=128"], "128 does not divide global_batch_size 64 (32 or 64 would)"),
        (
            ["training.schedule.warmup=0.5", "training.schedule.cooldown=0.6"],
            "warmup and cooldown together are longer than the training run",
        ),
        (["training.steps=10", "training.schedule.warmup=5"], "warmup and cooldown together are longer than the training run"),
        (["training.minutes=3", "training.schedule.warmup=5"], "must be a share below 1 when training.minutes is set"),
        (["training.steps=null"], "set how long to train with one of steps, tokens, epochs, minutes"),
    ],
)
def test_contradictory_keys_are_rejected(settings: list[str], expected: str) -> None:
    (problem,) = problems(SMALLEST, *settings)
    assert expected in problem


def test_the_files_named_in_a_recipe_must_exist_and_be_long_enough(tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too short")
    text = f"data:\n  train: {short}\n  heldout: {tmp_path}/none.txt\ntokenizer: {{path: none.json}}\ntraining: {{steps: 1}}\n"
    with pytest.raises(RecipeError) as caught:
        loads(text, name="my.yaml")
    assert sorted(caught.value.problems) == sorted(
        [
            f"my.yaml:3: data.heldout: {tmp_path}/none.txt: no such file or folder",
            "my.yaml:4: tokenizer.path: none.json: no such file or folder",
            "my.yaml: model.context_length: 256 is longer than the training text (9 bytes)",
        ]
    )
    assert loads(text, check_files=False).data.train == (str(short),)


def test_a_context_longer_than_the_held_out_text_is_rejected_before_any_text_is_read(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("x" * 1000)
    with pytest.raises(RecipeError, match=r"my\.yaml:3: model\.context_length: 256 is longer than the held-out text \(100 bytes\)"):
        loads(f"data: {{train: {text}}}\ntraining: {{steps: 1}}\nmodel: {{context_length: 256}}\n", name="my.yaml")


@pytest.mark.parametrize(
    ("override", "keys", "value"),
    [
        ("name=a=b", ("name",), "a=b"),
        ("name=a=b=", ("name",), "a=b="),
        ('name="5"', ("name",), "5"),
        ("name=Note: this", ("name",), "Note: this"),
        ("seed=1_000", ("seed",), 1000),
        ("training.optimizer.lr=3e-4", ("training", "optimizer", "lr"), 3e-4),
        ("training.optimizer.betas=[0.8, 0.9]", ("training", "optimizer", "betas"), (0.8, 0.9)),
        ("data.train=-", ("data", "train"), ("-",)),
        ("data.train=*.txt", ("data", "train"), ("*.txt",)),
        ("data.train=s3://bucket/a?b=c", ("data", "train"), ("s3://bucket/a?b=c",)),
        ("data.train=[a.txt, b.txt]", ("data", "train"), ("a.txt", "b.txt")),
        ("sampling.prompts=# A heading", ("sampling", "prompts"), ("# A heading",)),
        ("sampling.prompts=%d items", ("sampling", "prompts"), ("%d items",)),
        ("model.n_kv_head=null", ("model", "n_kv_head"), None),
    ],
)
def test_an_override_sets_its_key(override: str, keys: tuple[str, ...], value: object) -> None:
    setting: object = read(SMALLEST, override)
    for key in keys:
        setting = getattr(setting, key)
    assert setting == value


@pytest.mark.parametrize("length", ["tokens=1e6", "epochs=2.5", "minutes=3", "steps=7"])
def test_overriding_the_training_length_replaces_the_length_in_the_file(length: str) -> None:
    training = read(SMALLEST, f"training.{length}").training
    key, _, value = length.partition("=")
    lengths = {name: getattr(training, name) for name in ("steps", "tokens", "epochs", "minutes")}
    assert lengths.pop(key) == float(value)
    assert set(lengths.values()) == {None}


def test_two_training_lengths_on_the_command_line_are_rejected() -> None:
    with pytest.raises(InputError, match="only one of steps, tokens, epochs, minutes can be set"):
        read(SMALLEST, "training.steps=3", "training.minutes=1")
    assert read(SMALLEST, "training.minutes=1", "training.minutes=2").training.minutes == 2


def test_overrides_expand_short_forms_and_the_last_override_wins() -> None:
    text = "data: {train: a}\ntokenizer: bpe\ntraining: {steps: 9, optimizer: adamw, schedule: cosine}\n"
    recipe = read(text, "training.optimizer.lr=1e-2", "training.schedule.floor=0.1", "tokenizer.vocab_size=300", "seed=1", "seed=2")
    assert recipe.training.optimizer == AdamWOptimizer(name="adamw", lr=0.01)
    assert recipe.training.schedule == CosineSchedule(name="cosine", floor=0.1)
    assert recipe.tokenizer == BpeTokenizer(kind="bpe", vocab_size=300)
    assert recipe.seed == 2


@pytest.mark.parametrize(
    ("written", "override", "expected"),
    [
        ("data.heldout=0.25", "data.heldout.by=document", {"data.heldout.share": 0.25, "data.heldout.by": "document"}),
        ("data.heldout=b.txt", "data.heldout.share=0.2", {"data.heldout.share": 0.2, "data.heldout.by": "tail"}),
        ("data.heldout=b.txt", "data.heldout.sources=c.txt", {"data.heldout": ["c.txt"]}),
        ("model.init_from=a", "model.init_from.head=off", {"model.init_from.run": "a", "model.init_from.head": False}),
        ("training.optimizer=auto", "training.optimizer.lr=1", {"training.optimizer.name": "muon", "training.optimizer.lr": 1.0}),
    ],
)
def test_an_override_keeps_the_keys_of_a_short_form_unless_they_exclude_each_other(
    written: str, override: str, expected: dict[str, object]
) -> None:
    resolved = flattened(read(SMALLEST, written, override).as_dict())
    assert {key: resolved[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("tokenizer={kind: wordpiece, digits: 3}", "tokenizer.digits: not a key of kind wordpiece (kinds bpe and unigram have it)"),
        ("tokenizer={path: a.json, vocab_size: 9}", "tokenizer.vocab_size: not a key of kind file (kinds bpe, unigram, wordpiece"),
        ("tokenizer={kind: word, dropout: 0.1}", "tokenizer.dropout: not a key of kind word (kind bpe has it)"),
        ("training.schedule={cooldwn: 0.1}", "training.schedule.cooldwn: unknown key (did you mean cooldown?)"),
        ("training.optimizer={momentum: 0.9, name: adamw}", "not a key of optimizer adamw (optimizer muon has it)"),
        ("data.heldout={share: 0.1, sources: b.txt}", "data.heldout.share: cannot be combined with sources (only with share)"),
    ],
)
def test_the_error_for_a_key_of_another_variant_lists_the_variants_that_have_it(override: str, expected: str) -> None:
    (problem,) = problems(SMALLEST, override)
    assert expected in problem


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
@pytest.mark.parametrize("recipe", [Recipe, EmbeddingRecipe])
def test_variants_match_the_json_schema(recipe: type[BaseModel]) -> None:
    """Pydantic generates its JSON schema without `variants_of`. In the schema, only unions with a discriminator have tags."""
    schema = recipe.model_json_schema()
    n_unions = 0
    for name, definition in {recipe.__name__: schema, **schema["$defs"]}.items():
        section = next(candidate for candidate in sections_of(recipe) if candidate.__name__ == name)
        for key, value in definition["properties"].items():
            discriminator = value.get("discriminator")
            if discriminator is not None:
                variants = variants_of(section, key)
                assert variants is not None
                assert variants.discriminator == discriminator["propertyName"]
                tags = {tag: target.rpartition("/")[2] for tag, target in discriminator["mapping"].items()}
                assert {tag: variant.__name__ for tag, variant in variants.by_tag.items()} == tags
                n_unions += 1
    assert n_unions >= 2


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.n_heads=3", "--set model.n_heads=3: model.n_heads: unknown key (did you mean n_head?)"),
        ("model.n_head=x", "--set model.n_head=x: model.n_head: must be a whole number of at least 1, not 'x'"),
        (
            "model.n_head=5",
            "--set model.n_head=5: model.n_head: the width n_embd 384 is not divisible by 5 heads (4 heads would work)",
        ),
        ("stpes=3", "--set stpes=3: stpes: unknown key"),
        ("training.steps", "--set training.steps: must have the form SECTION.KEY=VALUE, for example training.steps=100"),
        ("=3", "--set =3: must have the form SECTION.KEY=VALUE, for example training.steps=100"),
        ("training..steps=3", "--set training..steps=3: must have the form SECTION.KEY=VALUE, for example training.steps=100"),
    ],
)
def test_an_invalid_override_is_reported_exactly_as_typed(override: str, expected: str) -> None:
    (problem,) = problems(SMALLEST, override)
    assert problem.startswith(expected)


def test_the_recipe_plan_text_and_data_modules_do_not_import_torch() -> None:
    modules = "tinylm.recipe, tinylm.cost.plan, tinylm.text.sources, tinylm.text.split, tinylm.data.prepare, tinylm.data.estimate"
    program = f"import sys, {modules}; print(sorted({{'torch', 'transformers', 'pyarrow'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("text", ["[" * 5000, "a: " + "[" * 5000 + "]" * 5000, "a: &a [*a]"])
def test_yaml_nested_too_deeply_is_rejected(text: str) -> None:
    with pytest.raises(InputError, match="nested too deeply"):
        loads(text)


def test_a_tag_that_cannot_convert_its_value_is_rejected() -> None:
    with pytest.raises(InputError, match="remove tags such as !!int"):
        loads("seed: !!int abc")


def test_the_error_for_a_single_dash_suggests_quoting_it() -> None:
    with pytest.raises(InputError, match=r"recipe:2: not valid YAML.*quote a value that is a single -"):
        loads("data:\n  train: -")
