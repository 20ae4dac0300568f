"""Exported folders are what transformers loads, and what transformers saved comes in as the same model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from exchange import CONTEXT, Make
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from tinylm.errors import InputError, WorkError
from tinylm.evaluation.measure import measure
from tinylm.generation.engine import generate
from tinylm.generation.sampling import SamplingOptions
from tinylm.interchange import huggingface, verify
from tinylm.interchange.exporting import export
from tinylm.interchange.importing import import_model
from tinylm.model.transformer import Transformer
from tinylm.reporting import CollectingReporter
from tinylm.run import Run

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
SHAPES: list[tuple[str, str, dict[str, Any]]] = [
    ("gpt2", "GPT2LMHeadModel", {}),
    ("gpt2", "GPT2LMHeadModel", {"bias": False, "tie_embeddings": False}),
    ("gpt2", "GPT2LMHeadModel", {"feed_forward": "gelu_exact", "n_inner": 100, "norm_gain": False}),
    ("llama", "LlamaForCausalLM", {}),
    ("llama", "LlamaForCausalLM", {"bias": True, "n_kv_head": 2, "tie_embeddings": True}),
    ("llama", "Qwen3ForCausalLM", {"qk_norm": True, "n_kv_head": 1, "head_dim": 16, "rope_theta": 500.0}),
    ("modern", "TinylmForCausalLM", {}),
    ("modern", "TinylmForCausalLM", MODERN),
    ("gpt2", "TinylmForCausalLM", {"norm_position": "post", "position": "sinusoidal", "feed_forward": "swiglu"}),
    ("modern", "TinylmForCausalLM", {"parallel_residual": True, "position": "learned", "tie_embeddings": True, "bias": True}),
]


def network_of(run: Run) -> Transformer:
    return run.network(run.checkpoint(), CPU)


def loaded(folder: Path) -> tuple[Any, Any]:
    """As a user of transformers loads them."""
    own = (folder / huggingface.MODELING).exists()
    with huggingface.quiet(transformers):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=own)
        return tokenizer, transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=own).eval()


@pytest.mark.parametrize(("preset", "name", "parts"), SHAPES, ids=str)
def test_transformers_has_the_same_ids_logits_and_greedy_text(
    preset: str, name: str, parts: dict[str, Any], run_of: Make, tmp_path: Path, english: str
) -> None:
    run = run_of(preset, **parts)
    done = export(run, "hf", tmp_path / "out")
    assert done.architecture == name
    assert done.largest_difference <= 1e-4
    tokenizer, other = loaded(tmp_path / "out")
    network = network_of(run)
    assert type(other).__name__ == name
    for text in (english[:500], "a <|endoftext|> b", "  naïve 🙂\n"):
        assert tokenizer(text)["input_ids"] == run.tokenizer.encode(text)
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    ids = torch.tensor([run.tokenizer.encode(english[:400])[:CONTEXT]])
    with torch.no_grad():
        torch.testing.assert_close(other(ids).logits, network(ids), atol=1e-4, rtol=0)
    prompt = "The for statement"
    written = generate(network, run.tokenizer, prompt, SamplingOptions(12, 0.0, None))[0].text
    inputs = tokenizer(prompt, return_tensors="pt")
    theirs = other.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(theirs[0], skip_special_tokens=True) == prompt + written

    import_model(tmp_path / "out", tmp_path / "back")
    with torch.no_grad():
        assert torch.equal(network_of(Run.open(tmp_path / "back"))(ids), network(ids))


def test_our_own_code_generates_with_padding_beams_and_without_a_cache(run_of: Make, tmp_path: Path) -> None:
    export(run_of("modern", **MODERN), "hf", tmp_path / "out")
    tokenizer, other = loaded(tmp_path / "out")
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    texts = ["The for statement", "An expression that is longer than that"]
    alone = [other.generate(**tokenizer(text, return_tensors="pt"), **settings)[0, -8:].tolist() for text in texts]
    together = other.generate(**tokenizer(texts, return_tensors="pt", padding=True), **settings)[:, -8:].tolist()
    assert together == alone
    inputs = tokenizer(texts[0], return_tensors="pt")
    beams = [other.generate(**inputs, **settings, num_beams=3, use_cache=cache).tolist() for cache in (True, False)]
    assert beams[0] == beams[1]
    with pytest.raises(ValueError, match=f"{CONTEXT + 1} positions do not fit"):
        other(torch.zeros((1, CONTEXT + 1), dtype=torch.long))
    assert other(inputs["input_ids"], labels=inputs["input_ids"]).loss > 0


def test_the_folder_is_complete_and_says_what_it_holds(run_of: Make, tmp_path: Path) -> None:
    export(run_of("llama", n_kv_head=2), "hf", tmp_path / "out")
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


def test_the_card_shows_the_numbers_that_were_measured(tiny_run: Run, tmp_path: Path) -> None:
    reporter = CollectingReporter()
    done = export(tiny_run, "hf", tmp_path / "out", reporter=reporter)
    measured = next(line for line in tiny_run.metrics() if line["kind"] == "eval" and line["step"] == done.step)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| {measured['val_loss']:.4f} | {measured['val_bits_per_byte']:.4f} |" in card
    assert "10% by tail" in card
    assert reporter.notes == [
        "no class of transformers has embedding_norm true, feed_forward relu2: the folder carries modeling_tinylm.py"
    ]


def test_a_run_that_went_out_and_came_back_has_the_same_perplexity(tiny_run: Run, text_file: Path, tmp_path: Path) -> None:
    export(tiny_run, "hf", tmp_path / "out")
    import_model(tmp_path / "out", tmp_path / "back")
    before, after = (measure(run, [str(text_file)]).perplexity for run in (tiny_run, Run.open(tmp_path / "back")))
    assert after.perplexity == pytest.approx(before.perplexity, rel=1e-6)
    assert (after.tokens, after.bytes) == (before.tokens, before.bytes)


def test_an_export_that_is_not_the_same_model_leaves_nothing(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of("gpt2")
    truth = huggingface.hf_architectures.tensors_of

    def spoiled(*arguments: Any) -> dict[str, torch.Tensor]:
        tensors = truth(*arguments)
        tensors["transformer.h.0.attn.c_attn.weight"][0, 0] += 0.05
        return tensors

    monkeypatch.setattr(huggingface.hf_architectures, "tensors_of", spoiled)
    with pytest.raises(WorkError, match="not the same model: logits differ by"):
        export(run, "hf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_place_that_is_taken_is_left_alone(run_of: Make, tmp_path: Path) -> None:
    run = run_of("gpt2")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for overwrite, told in ((False, "is not empty"), (True, "is no exported folder")):
        with pytest.raises(InputError, match=told):
            export(run, "hf", tmp_path / "mine", overwrite=overwrite)
    with pytest.raises(InputError, match="is a folder, not a file"):
        export(run, "gguf", tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"
    export(run, "hf", tmp_path / "out")
    export(run, "hf", tmp_path / "out", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out", "run"]


# What transformers itself made.


def bpe(english: str, end: str | None = "</s>") -> Backend:
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


def randomly(config: Any) -> Any:
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
THEIRS: dict[str, Any] = {
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


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("sharded", [False, True])
def test_what_transformers_saved_is_the_same_model_here(name: str, sharded: bool, tmp_path: Path, english: str) -> None:
    if sharded and name not in ("gpt2", "llama"):
        pytest.skip("two kinds of shards are enough")
    other = randomly(THEIRS[name]())
    with huggingface.quiet(transformers):
        other.save_pretrained(tmp_path / "theirs", **({"max_shard_size": "20KB"} if sharded else {}))
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists() == sharded
    bpe(english).save(str(tmp_path / "theirs" / "tokenizer.json"))
    done = import_model(tmp_path / "theirs", tmp_path / "run")
    assert done.largest_difference is not None
    assert done.largest_difference <= 1e-4
    run = Run.open(tmp_path / "run")
    network = network_of(run)
    rows = verify.windows(run.tokenizer.encode(english[:3000]), min(CONTEXT, 40))
    assert verify.largest_difference(network, lambda ids: other(ids).logits, rows) <= 1e-4
    assert run.tokenizer.vocab_size == network.vocab_size == other.config.vocab_size
    assert run.tokenizer.decode(run.tokenizer.encode("naïve 🙂 <s>")) == "naïve 🙂 <s>"
    assert measure(run, [str(tmp_path / "run" / "recipe.yaml")]).perplexity.tokens > 0
    assert generate(network, run.tokenizer, "The", SamplingOptions(3))[0].finish_reason in ("length", "end")


def gpt2_folder(folder: Path, english: str, **changes: Any) -> Path:
    with huggingface.quiet(transformers):
        randomly(THEIRS["gpt2"]()).save_pretrained(folder)
    bpe(english).save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_old_names_and_buffers_are_understood(tmp_path: Path, english: str) -> None:
    folder = gpt2_folder(tmp_path / "theirs", english)
    tensors = load_file(folder / "model.safetensors")
    older = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    older["h.0.attn.bias"] = torch.ones(1, 1, CONTEXT, CONTEXT)
    save_file(older, folder / "model.safetensors", {"format": "pt"})
    import_model(folder, tmp_path / "run")


def test_vocab_and_merges_are_gpt2s_tokenizer(tmp_path: Path, english: str) -> None:
    folder = gpt2_folder(tmp_path / "theirs", english)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"no tokenizer\.json, nor vocab\.json and merges\.txt"):
        import_model(folder, tmp_path / "run")
    bpe(english, end=None).model.save(str(folder))
    reporter = CollectingReporter()
    import_model(folder, tmp_path / "run", reporter=reporter)
    tokenizer = Run.open(tmp_path / "run").tokenizer
    assert tokenizer.end_of_text == 300, "the first row without a token becomes the end of text"
    assert tokenizer.decode(tokenizer.encode("héllo\n 12")) == "héllo\n 12"
    assert reporter.notes == ["20 of 320 rows of the embedding have no token: kept, under names of their own"]


def test_an_end_of_text_of_another_name_is_found_in_the_configuration(tmp_path: Path, english: str) -> None:
    folder = gpt2_folder(tmp_path / "theirs", english, eos_token_id=301)
    bpe(english, end="<stop>").save(str(folder / "tokenizer.json"))
    import_model(folder, tmp_path / "run")
    tokenizer = Run.open(tmp_path / "run").tokenizer
    assert tokenizer.end_of_text == 301
    assert tokenizer.decode(tokenizer.encode("a <stop> b")) == "a <stop> b"


def test_a_shorter_context_is_the_same_model_as_far_as_it_reaches(tmp_path: Path, english: str) -> None:
    folder = gpt2_folder(tmp_path / "theirs", english)
    assert import_model(folder, tmp_path / "run", context=20).context_length == 20
    assert network_of(Run.open(tmp_path / "run")).positions.weight.shape == (20, 32)  # type: ignore[union-attr]
    with pytest.raises(InputError, match="49 positions are not in the model's 48"):
        import_model(folder, tmp_path / "other", context=49)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_type": "bloom"}, "a model of type 'bloom' is not read here"),
        ({"activation_function": "mish"}, "activation_function 'mish' is not computed here"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True is not computed here"),
        ({"quantization_config": {"bits": 4}}, "quantization_config .* is not computed here"),
        ({"n_embd": 48}, "the tensors do not fit config.json"),
        ({"n_layer": 3}, r"lacks transformer\.h\.2\.ln_1\.weight, .* and 9 more"),
        ({"n_layer": 1}, r"holds transformer\.h\.1\..*which has no place here"),
        ({"n_head": "four"}, "not the shape of a model"),
    ],
)
def test_a_folder_that_is_not_such_a_model_is_refused_and_nothing_is_left(
    changes: dict[str, Any], told: str, tmp_path: Path, english: str
) -> None:
    folder = gpt2_folder(tmp_path / "theirs", english, **changes)
    with pytest.raises(InputError, match=told):
        import_model(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_scaled_positions_are_refused(tmp_path: Path, english: str) -> None:
    folder = gpt2_folder(tmp_path / "theirs", english)
    config = {**LLAMA, "model_type": "llama", "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="scaled rotary positions"):
        import_model(folder, tmp_path / "run")


def test_a_damaged_or_deceitful_folder_is_refused(tmp_path: Path, english: str) -> None:
    folder = gpt2_folder(tmp_path / "theirs", english)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cannot be read"):
        import_model(folder, tmp_path / "run")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"wte.weight": "../run.safetensors"}}))
    with pytest.raises(InputError, match="names a file elsewhere"):
        import_model(folder, tmp_path / "run")
    index.write_text("[]")
    with pytest.raises(InputError, match="not an index of shards"):
        import_model(folder, tmp_path / "run")
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        import_model(folder, tmp_path / "run")
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match="a Hugging Face folder has one"):
        import_model(folder, tmp_path / "run")
