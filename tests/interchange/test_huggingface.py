"""transformers loads the folders that tinylm exports, and tinylm imports the folders that transformers saves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model.parts import CASES as KEY_CASES
from model.parts import case_network, cases_and_presets
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import ids as token_ids
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from untrained_runs import CONTEXT, MakeRun

from tinylm.errors import InputError, WorkError
from tinylm.evaluation.evaluate_run import evaluate_run
from tinylm.generation.engine import generate
from tinylm.generation.sampling import SamplingOptions
from tinylm.interchange import hf_architectures, huggingface, verify
from tinylm.interchange.exporting import export
from tinylm.interchange.importing import import_model
from tinylm.model.transformer import Transformer
from tinylm.recipe.support import unsupported
from tinylm.reporting import CollectingReporter
from tinylm.run import Run
from tinylm.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")
CPU = torch.device("cpu")
MODERN = {
    "ngram_embeddings": [2, 3],
    "n_kv_head": 2,
    "value_embeddings": 1,
    "value_residual": True,
    "embedding_shortcut": True,
    "logit_softcap": 5.0,
}
# (preset, class that loads the export, model overrides)
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("gpt2", "GPT2LMHeadModel", {}),
    ("gpt2", "GPT2LMHeadModel", {"bias": False, "tie_embeddings": False}),
    ("gpt2", "GPT2LMHeadModel", {"feed_forward": "gelu_exact", "n_inner": 100, "norm_gain": False}),
    ("llama", "LlamaForCausalLM", {}),
    ("llama", "LlamaForCausalLM", {"bias": True, "n_kv_head": 2, "tie_embeddings": True}),
    ("llama", "MistralForCausalLM", {"attention_window": 7, "n_kv_head": 2}),
    ("llama", "LlamaForCausalLM", {"rope_scaling": {"type": "llama3", "factor": 8.0, "original_context": 16}}),
    ("llama", "LlamaForCausalLM", {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_context": 16}}),
    ("llama", "Qwen3ForCausalLM", {"qk_norm": True, "n_kv_head": 1, "head_dim": 16, "rope_theta": 500.0}),
    ("modern", "TinylmForCausalLM", {}),
    ("modern", "TinylmForCausalLM", MODERN),
    ("modern", "TinylmForCausalLM", {"attention_window": 7, "attention_pattern": ["local", "global"]}),
    ("gpt2", "TinylmForCausalLM", {"norm_position": "post", "position": "sinusoidal", "feed_forward": "swiglu"}),
    ("modern", "TinylmForCausalLM", {"parallel_residual": True, "position": "learned", "tie_embeddings": True, "bias": True}),
]


QWEN3_CASES = [("llama", {**case, "qk_norm": True}) for case in KEY_CASES if "qk_norm" not in case]


def load_network(run: Run) -> Transformer:
    return run.network(run.checkpoint(), CPU)


def load_with_transformers(folder: Path) -> tuple[Any, Any]:
    """Load the tokenizer and the model as transformers users do."""
    remote_code = (folder / huggingface.MODELING_FILE).exists()
    with huggingface.quiet(transformers):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=remote_code)
        return tokenizer, transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=remote_code).eval()


@pytest.mark.parametrize(("preset", "class_name", "parts"), CASES, ids=str)
def test_transformers_computes_the_same_ids_logits_and_greedy_text(
    preset: str, class_name: str, parts: dict[str, Any], make_run: MakeRun, tmp_path: Path, english: str
) -> None:
    run = make_run(preset, **parts)
    result = export(run, "hf", tmp_path / "out")
    assert result.architecture == class_name
    assert result.largest_difference <= 1e-4
    tokenizer, other = load_with_transformers(tmp_path / "out")
    network = load_network(run)
    assert type(other).__name__ == class_name
    for text in (english[:500], "a <|endoftext|> b", "  naïve 🙂\n"):
        assert tokenizer(text)["input_ids"] == run.tokenizer.encode(text)
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    ids = torch.tensor([run.tokenizer.encode(english[:400])[:CONTEXT]])
    with torch.no_grad():
        torch.testing.assert_close(other(ids).logits, network(ids), atol=1e-4, rtol=0)
    prompt = "The for statement"
    generated = generate(network, run.tokenizer, prompt, SamplingOptions(12, 0.0, None))[0].text
    inputs = tokenizer(prompt, return_tensors="pt")
    theirs = other.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(theirs[0], skip_special_tokens=True) == prompt + generated

    import_model(tmp_path / "out", tmp_path / "back")
    with torch.no_grad():
        assert torch.equal(load_network(Run.open(tmp_path / "back"))(ids), network(ids))


@pytest.mark.parametrize(("preset", "case"), [*cases_and_presets(), *QWEN3_CASES], ids=str)
def test_every_key_is_exported_correctly_or_rejected(
    preset: str, case: dict[str, Any], tmp_path: Path, tokenizers: dict[str, Tokenizer]
) -> None:
    network = case_network(case, preset)
    family, _ = hf_architectures.find_family(network.model)
    if family is None and unsupported(network.model, huggingface.SUPPORTS):
        with pytest.raises(InputError, match="--to hf: export to Hugging Face does not support"):
            huggingface.write(tmp_path, network, tokenizers["byte"], "")
        return
    huggingface.write(tmp_path, network, tokenizers["byte"], "")
    with huggingface.quiet(transformers):
        other = huggingface.load_model(tmp_path, tmp_path / huggingface.MODELING_FILE)
    assert type(other).__name__ == huggingface.select_class(network.model)[0]
    tokens = token_ids(2, 16)
    with torch.no_grad():
        torch.testing.assert_close(other(tokens).logits, network(tokens), atol=1e-4, rtol=1e-4)


def test_exported_modeling_code_supports_padding_beam_search_and_generation_without_a_cache(
    make_run: MakeRun, tmp_path: Path
) -> None:
    export(make_run("modern", **MODERN), "hf", tmp_path / "out")
    tokenizer, other = load_with_transformers(tmp_path / "out")
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    texts = ["The for statement", "An expression that is longer than that"]
    separately = [other.generate(**tokenizer(text, return_tensors="pt"), **settings)[0, -8:].tolist() for text in texts]
    batched = other.generate(**tokenizer(texts, return_tensors="pt", padding=True), **settings)[:, -8:].tolist()
    assert batched == separately
    inputs = tokenizer(texts[0], return_tensors="pt")
    beams = [other.generate(**inputs, **settings, num_beams=3, use_cache=cache).tolist() for cache in (True, False)]
    assert beams[0] == beams[1]
    with pytest.raises(ValueError, match=f"{CONTEXT + 1} positions do not fit"):
        other(torch.zeros((1, CONTEXT + 1), dtype=torch.long))
    assert other(inputs["input_ids"], labels=inputs["input_ids"]).loss > 0


def test_the_folder_contains_all_files_and_their_metadata(make_run: MakeRun, tmp_path: Path) -> None:
    export(make_run("llama", n_kv_head=2), "hf", tmp_path / "out")
    files = {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == files
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["clean_up_tokenization_spaces"] is False
    assert config["eos_token"] == "<|endoftext|>"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "LlamaForCausalLM" in card
    assert "n_kv_head: 2" in card


def test_the_model_card_shows_the_evaluation_of_the_exported_step(tiny_run: Run, tmp_path: Path) -> None:
    reporter = CollectingReporter()
    result = export(tiny_run, "hf", tmp_path / "out", reporter=reporter)
    evaluation = next(line for line in tiny_run.metrics() if line["kind"] == "eval" and line["step"] == result.step)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| {evaluation['val_loss']:.4f} | {evaluation['val_bits_per_byte']:.4f} |" in card
    assert "Held-out text: the last 10% of the text (" in card
    assert reporter.notes == [
        "no transformers class supports embedding_norm true, feed_forward relu2; the folder includes modeling_tinylm.py instead"
    ]


def test_export_and_import_preserve_the_perplexity(tiny_run: Run, text_file: Path, tmp_path: Path) -> None:
    export(tiny_run, "hf", tmp_path / "out")
    import_model(tmp_path / "out", tmp_path / "back")
    before, after = (evaluate_run(run, [str(text_file)]).perplexity for run in (tiny_run, Run.open(tmp_path / "back")))
    assert after.perplexity == pytest.approx(before.perplexity, rel=1e-6)
    assert (after.tokens, after.bytes) == (before.tokens, before.bytes)


def test_an_export_with_wrong_logits_fails_and_leaves_no_folder(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run("gpt2")
    original = huggingface.hf_architectures.export_state_dict

    def corrupted(*arguments: Any) -> dict[str, torch.Tensor]:
        tensors = original(*arguments)
        tensors["transformer.h.0.attn.c_attn.weight"][0, 0] += 0.05
        return tensors

    monkeypatch.setattr(huggingface.hf_architectures, "export_state_dict", corrupted)
    with pytest.raises(WorkError, match="does not match the original model: outputs differ by"):
        export(run, "hf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_existing_destination_is_not_overwritten_by_accident(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("gpt2")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for overwrite, message in ((False, "is not empty"), (True, "not an exported folder")):
        with pytest.raises(InputError, match=message):
            export(run, "hf", tmp_path / "mine", overwrite=overwrite)
    with pytest.raises(InputError, match="is a folder, but this format needs a file"):
        export(run, "gguf", tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"
    export(run, "hf", tmp_path / "out")
    export(run, "hf", tmp_path / "out", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out", "run"]


# Tests that import folders saved by transformers.


def train_bpe(english: str, end: str | None = "</s>") -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\w+|[^\w]+"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False)
    backend.train_from_iterator([english[:20_000]], trainer)
    if end is not None:
        backend.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", end)])
        backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))])
    return backend


def random_model(config: Any) -> Any:
    torch.manual_seed(1)
    other = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return other


LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "vocab_size": 320,
}
CONFIGS: dict[str, Any] = {
    "gpt2": lambda: transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT, vocab_size=320),
    "gpt2 relu": lambda: transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=2, n_inner=60, n_positions=CONTEXT, vocab_size=302, activation_function="relu"
    ),
    "llama": lambda: transformers.LlamaConfig(**LLAMA, rope_parameters={"rope_type": "default", "rope_theta": 777.0}),
    "llama biases": lambda: transformers.LlamaConfig(**LLAMA, attention_bias=True, tie_word_embeddings=True),
    "mistral": lambda: transformers.MistralConfig(**LLAMA, sliding_window=40),
    "qwen2": lambda: transformers.Qwen2Config(**LLAMA),
    "qwen3": lambda: transformers.Qwen3Config(**LLAMA, head_dim=16),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("sharded", [False, True])
def test_a_model_saved_by_transformers_is_imported_with_the_same_logits(
    name: str, sharded: bool, tmp_path: Path, english: str
) -> None:
    if sharded and name not in ("gpt2", "llama"):
        pytest.skip("two sharded models are enough")
    other = random_model(CONFIGS[name]())
    with huggingface.quiet(transformers):
        other.save_pretrained(tmp_path / "theirs", **({"max_shard_size": "20KB"} if sharded else {}))
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists() == sharded
    train_bpe(english).save(str(tmp_path / "theirs" / "tokenizer.json"))
    result = import_model(tmp_path / "theirs", tmp_path / "run")
    assert result.largest_difference is not None
    assert result.largest_difference <= 1e-4
    run = Run.open(tmp_path / "run")
    network = load_network(run)
    assert network.model.attention_window == (40 if name == "mistral" else None)
    rows = verify.windows(run.tokenizer.encode(english[:3000]), CONTEXT)
    assert verify.largest_difference(network, lambda ids: other(ids).logits, rows) <= 1e-4
    assert run.tokenizer.vocab_size == network.vocab_size == other.config.vocab_size
    assert run.tokenizer.decode(run.tokenizer.encode("naïve 🙂 <s>")) == "naïve 🙂 <s>"
    assert evaluate_run(run, [str(tmp_path / "run" / "recipe.yaml")]).perplexity.tokens > 0
    assert generate(network, run.tokenizer, "The", SamplingOptions(3))[0].finish_reason in ("length", "end")


def gpt2_folder(folder: Path, english: str, **changes: Any) -> Path:
    with huggingface.quiet(transformers):
        random_model(CONFIGS["gpt2"]()).save_pretrained(folder)
    train_bpe(english).save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_a_checkpoint_with_the_tensor_names_and_buffers_of_older_transformers_is_imported_correctly(
    tmp_path: Path, english: str
) -> None:
    folder = gpt2_folder(tmp_path / "theirs", english)
    import_model(folder, tmp_path / "new")
    tensors = load_file(folder / "model.safetensors")
    older = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    assert older.keys().isdisjoint(tensors)
    older["h.0.attn.bias"] = torch.ones(1, 1, CONTEXT, CONTEXT)
    save_file(older, folder / "model.safetensors", {"format": "pt"})
    result = import_model(folder, tmp_path / "old")
    assert result.largest_difference is not None
    assert result.largest_difference <= 1e-4
    expected, actual = (load_network(Run.open(tmp_path / name)).state_dict() for name in ("new", "old"))
    assert actual.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in actual.items())


def test_a_gpt2_tokenizer_is_read_from_vocab_json_and_merges_txt(tmp_path: Path, english: str) -> None:
    folder = gpt2_folder(tmp_path / "theirs", english)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"neither tokenizer\.json nor vocab\.json and merges\.txt"):
        import_model(folder, tmp_path / "run")
    train_bpe(english, end=None).model.save(str(folder))
    reporter = CollectingReporter()
    import_model(folder, tmp_path / "run", reporter=reporter)
    tokenizer = Run.open(tmp_path / "run").tokenizer
    assert tokenizer.end_of_text == 300, "the first embedding row without a token becomes the end-of-text token"
    assert tokenizer.decode(tokenizer.encode("héllo\n 12")) == "héllo\n 12"
    assert reporter.notes == ["20 of 320 embedding rows have no token; kept them and added placeholder tokens"]


def test_the_eos_token_of_the_config_becomes_the_end_of_text_token(tmp_path: Path, english: str) -> None:
    folder = gpt2_folder(tmp_path / "theirs", english, eos_token_id=301)
    train_bpe(english, end="<stop>").save(str(folder / "tokenizer.json"))
    import_model(folder, tmp_path / "run")
    tokenizer = Run.open(tmp_path / "run").tokenizer
    assert tokenizer.end_of_text == 301
    assert tokenizer.decode(tokenizer.encode("a <stop> b")) == "a <stop> b"


def test_the_context_can_be_shortened_but_not_extended(tmp_path: Path, english: str) -> None:
    folder = gpt2_folder(tmp_path / "theirs", english)
    assert import_model(folder, tmp_path / "run", context=20).context_length == 20
    assert load_network(Run.open(tmp_path / "run")).positions.weight.shape == (20, 32)  # type: ignore[union-attr]
    with pytest.raises(InputError, match=r"between 1 and the model's context length \(48\)"):
        import_model(folder, tmp_path / "other", context=49)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bloom"}, "unsupported model_type 'bloom'"),
        ({"activation_function": "mish"}, "activation_function 'mish' is not supported"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config .* is not supported"),
        ({"n_embd": 48}, "the tensors do not match config.json"),
        ({"n_layer": 3}, r"missing tensors: transformer\.h\.2\.ln_1\.weight, .* and 9 more"),
        ({"n_layer": 1}, r"unexpected tensors: transformer\.h\.1\..* and 9 more"),
        ({"n_head": "four"}, "n_head: must be a whole number of at least 1"),
    ],
)
def test_an_unsupported_or_inconsistent_folder_is_rejected_and_no_run_is_created(
    changes: dict[str, Any], message: str, tmp_path: Path, english: str
) -> None:
    folder = gpt2_folder(tmp_path / "theirs", english, **changes)
    with pytest.raises(InputError, match=message):
        import_model(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_damaged_or_malicious_folder_is_rejected(tmp_path: Path, english: str) -> None:
    folder = gpt2_folder(tmp_path / "theirs", english)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="cannot be read"):
        import_model(folder, tmp_path / "run")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"wte.weight": "../run.safetensors"}}))
    with pytest.raises(InputError, match="refers to a file outside the folder"):
        import_model(folder, tmp_path / "run")
    index.write_text("[]")
    with pytest.raises(InputError, match="invalid index of weight shards"):
        import_model(folder, tmp_path / "run")
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        import_model(folder, tmp_path / "run")
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match="not a Hugging Face folder"):
        import_model(folder, tmp_path / "run")
