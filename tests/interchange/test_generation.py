"""Exported folders work in transformers: the model card's code, `generate`, and every argument of tinylm's custom model class.

`.ci/run` runs these tests with the oldest and newest supported versions of transformers.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from untrained_runs import CONTEXT, MakeRun

from tinylm.errors import InputError, WorkError
from tinylm.interchange import huggingface
from tinylm.interchange.exporting import ExportResult, export
from tinylm.interchange.generation_check import Snippet
from tinylm.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")
GPT2_LIKE: tuple[str, dict[str, Any]] = ("gpt2", {})
LLAMA_LIKE: tuple[str, dict[str, Any]] = ("llama", {"n_kv_head": 2})
MODERN: tuple[str, dict[str, Any]] = (
    "modern",
    {"ngram_embeddings": [2, 3], "n_kv_head": 2, "value_embeddings": 1, "value_residual": True, "logit_softcap": 5.0},
)
PLAIN: tuple[str, dict[str, Any]] = ("modern", {"attention_window": 7, "attention_pattern": ["local", "global"]})
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}


def load(folder: Path, auto_class: str = "AutoModelForCausalLM") -> tuple[Any, Any]:
    """Load the tokenizer and the model as shown in the model card."""
    trust = {"trust_remote_code": (folder / huggingface.MODELING_FILE).exists()}
    with huggingface.quiet(transformers):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **trust)
        return tokenizer, getattr(transformers, auto_class).from_pretrained(folder, **trust).eval()


@pytest.fixture(scope="module")
def exported(export_once: Callable[..., ExportResult]) -> Any:
    """`exported(MODERN)` exports a model and returns its folder, which tests must not modify because they share it."""
    return lambda case: Path(export_once(case[0], **case[1]).path)


def test_the_model_card_code_runs_in_a_new_process(exported: Any) -> None:
    folder = exported(MODERN)
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert code is not None
    (folder.parent / "home").mkdir()
    program = code[1].replace("'run'", repr(str(folder)))
    environment = {**os.environ, "HF_HOME": str(folder.parent / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Once")
    assert len(done.stdout) > len("Once") + 10


@pytest.mark.parametrize("case", [GPT2_LIKE, LLAMA_LIKE, MODERN, PLAIN], ids=str)
def test_the_tokenizer_returns_only_what_the_model_accepts(case: tuple[str, dict[str, Any]], exported: Any) -> None:
    tokenizer, other = load(exported(case))
    inputs = tokenizer(["Once", "The for statement is"], return_tensors="pt", padding=True)
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert inputs["attention_mask"][0, 0] == 0, "padding is on the left"
    assert tokenizer.unk_token == tokenizer.eos_token == "<|endoftext|>"
    other(**inputs)


@pytest.mark.parametrize("case", [MODERN, PLAIN], ids=str)
def test_the_custom_class_generates_the_same_tokens_with_padding_beams_and_any_cache(
    case: tuple[str, dict[str, Any]], exported: Any
) -> None:
    tokenizer, other = load(exported(case))
    texts = ["The for statement", "An expression that is longer than that"]
    separately = [other.generate(**tokenizer(text, return_tensors="pt"), **GREEDY)[0, -8:].tolist() for text in texts]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        with huggingface.quiet(transformers):
            generated = other.generate(**batch, **GREEDY, **options)
        assert generated[:, -8:].tolist() == separately, options
    beams = [other.generate(**batch, **GREEDY, num_beams=3, use_cache=cache).tolist() for cache in (True, False)]
    assert beams[0] == beams[1]
    assert [row[-8:] for row in beams[0]] != separately


def test_the_custom_class_rejects_arguments_it_would_ignore(exported: Any) -> None:
    tokenizer, other = load(exported(MODERN))
    ids = tokenizer("The for statement", return_tensors="pt")["input_ids"]
    with pytest.raises(TypeError, match="does not support the arguments token_type_ids"):
        other(ids, token_type_ids=torch.zeros_like(ids))
    with pytest.raises((TypeError, ValueError), match="head_mask"):
        other.generate(ids, head_mask=torch.ones(1), max_new_tokens=2)
    with pytest.raises(ValueError, match="this model requires input_ids"):
        other(inputs_embeds=other.get_input_embeddings()(ids))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        other()
    with pytest.raises(ValueError, match="attention_mask must have the shape"):
        other(ids, attention_mask=torch.ones(1, 1, 1, 1))
    with pytest.raises(ValueError, match=f"{CONTEXT + 1} positions do not fit"):
        other(torch.zeros((1, CONTEXT + 1), dtype=torch.long))


def test_the_custom_class_returns_hidden_states_attentions_and_a_loss(exported: Any) -> None:
    tokenizer, other = load(exported(PLAIN))
    inputs = tokenizer("The for statement is used to", return_tensors="pt")
    ids = inputs["input_ids"]
    with torch.no_grad():
        plain = other(**inputs)
        output = other(**inputs, labels=ids, output_hidden_states=True, output_attentions=True)
        embedded = other(inputs_embeds=other.get_input_embeddings()(ids), attention_mask=inputs["attention_mask"])
        as_tuple = other(**inputs, return_dict=False)
    torch.testing.assert_close(output.logits, plain.logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(embedded.logits, plain.logits)
    assert torch.equal(as_tuple[0], plain.logits)
    assert plain.hidden_states is None
    assert plain.attentions is None
    assert len(output.hidden_states) == other.config.n_layer + 1
    torch.testing.assert_close(other.head(output.hidden_states[-1]), output.logits)
    assert len(output.attentions) == other.config.n_layer
    for layer, pattern in enumerate(output.attentions):
        torch.testing.assert_close(pattern.sum(-1), torch.ones(pattern.shape[:-1]))
        assert int((pattern[0, 0, -1] > 0).sum()) == (7 if layer % 2 == 0 else ids.shape[1])
    expected = torch.nn.functional.cross_entropy(output.logits[0, :-1], ids[0, 1:])
    torch.testing.assert_close(output.loss, expected)


def test_the_cache_from_one_call_can_be_passed_to_the_next(exported: Any) -> None:
    tokenizer, other = load(exported(PLAIN))
    ids = tokenizer("The for statement is used to iterate", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        full = other(ids).logits
        first = other(ids[:, :5], use_cache=True)
        rest = other(ids[:, 5:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat((first.logits, rest.logits), 1), full, atol=1e-5, rtol=1e-5)


def test_auto_model_returns_the_hidden_states_before_the_head(exported: Any) -> None:
    folder = exported(MODERN)
    (tokenizer, other), (_, base) = load(folder), load(folder, "AutoModel")
    inputs = tokenizer("The for statement", return_tensors="pt")
    with torch.no_grad():
        logits = other.head(base(**inputs).last_hidden_state)
        cap = other.config.logit_softcap
        torch.testing.assert_close(cap * torch.tanh(logits / cap), other(**inputs).logits)


@pytest.mark.parametrize("case", [MODERN, PLAIN], ids=str)
def test_gradient_checkpointing_does_not_change_the_gradients(case: tuple[str, dict[str, Any]], exported: Any) -> None:
    tokenizer, other = load(exported(case))
    ids = tokenizer("The for statement is used to iterate", return_tensors="pt")["input_ids"]
    gradients = []
    for enable in (False, True):
        other.train()
        other.zero_grad()
        if enable:
            other.gradient_checkpointing_enable()
        other(ids, labels=ids).loss.backward()
        gradients.append(
            {name: parameter.grad.clone() for name, parameter in other.named_parameters() if parameter.grad is not None}
        )
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize("tied", [False, True])
def test_resized_embeddings_keep_the_logits_of_old_tokens(tied: bool, exported: Any) -> None:
    preset, parts = MODERN
    folder = exported((preset, {**parts, "tie_embeddings": tied}))
    tokenizer, other = load(folder)
    inputs = tokenizer(["The for statement is used to", "Once"], return_tensors="pt", padding=True)
    old = other.config.vocab_size
    with torch.no_grad(), huggingface.quiet(transformers):
        before = other(**inputs).logits
        other.resize_token_embeddings(old + 5)
        after = other(**inputs).logits
        other.save_pretrained(folder.parent / "resized")
        again = type(other).from_pretrained(folder.parent / "resized").eval()
        assert torch.equal(again(**inputs).logits, after)
        new = torch.full((1, 2), old + 3)
        assert again(new).logits.shape == (1, 2, old + 5)
    assert after.shape[-1] == old + 5
    torch.testing.assert_close(after[..., :old], before)


def test_an_export_that_generates_different_text_fails(make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits of a full forward pass are still correct, so only the `generate` check can detect the error."""
    broken = tmp_path / huggingface.MODELING_FILE
    code = Path(huggingface.__file__).with_name(huggingface.MODELING_FILE).read_text()
    change = (".clamp_min(0)[:, -T:]", ".clamp_min(0)[:, -T:] * (past == 0)")
    assert change[0] in code
    broken.write_text(code.replace(*change).replace("if position_ids is None", "if True"))
    copy = huggingface.shutil.copyfile
    monkeypatch.setattr(huggingface.shutil, "copyfile", lambda source, target: copy(broken, target))
    with pytest.raises(WorkError, match="with the code in the model card, the exported folder generates different text"):
        export(make_run("modern"), "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_model_card_snippet_fits_the_context_and_the_tokenizer(tokenizers: dict[str, Tokenizer]) -> None:
    assert Snippet.choose(tokenizers["byte"], 64, "text", False) == Snippet("Once", 40, False)
    assert Snippet.choose(tokenizers["byte"], 10, "text", False) == Snippet("Once", 6, False)
    assert Snippet.choose(tokenizers["byte"], 4, "text", False) == Snippet("t", 3, False)
    compile(Snippet('a "quoted" \\ text', 3, True).code("it's"), "card", "exec")


def test_the_tokenizer_config_defines_every_special_token(exported: Any) -> None:
    folder = exported(GPT2_LIKE)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert {config[f"{name}_token"] for name in ("bos", "eos", "pad", "unk")} == {"<|endoftext|>"}
    assert config["model_input_names"] == ["input_ids", "attention_mask"]


@pytest.mark.parametrize(("case", "type"), [(GPT2_LIKE, "bf16"), (MODERN, "f16"), (MODERN, "bf16")], ids=str)
def test_weights_are_stored_and_loaded_in_16_bits(
    case: tuple[str, dict[str, Any]],
    type: str,
    make_run: MakeRun,
    export_once: Callable[..., ExportResult],
    tmp_path: Path,
) -> None:
    result = export(make_run(case[0], **case[1]), "hf", tmp_path / "out", type=type)
    full = export_once(case[0], **case[1])
    assert result.type == type
    assert result.largest_difference <= 1e-4
    assert result.perplexity == pytest.approx(result.run_perplexity, rel=0.05)
    assert result.perplexity != result.run_perplexity
    size, full_size = (Path(each.path, "model.safetensors").stat().st_size for each in (result, full))
    assert full.perplexity is None
    assert size < 0.6 * full_size
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[type]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")
    tokenizer, _ = load(tmp_path / "out")
    with huggingface.quiet(transformers):
        key = next(iter(huggingface.float32_argument(transformers)))
        trust = {"trust_remote_code": (tmp_path / "out" / huggingface.MODELING_FILE).exists(), key: dtype}
        half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", **trust)
    assert half.generate(**tokenizer("The", return_tensors="pt"), max_new_tokens=3, do_sample=False).shape[1] >= 2


def test_weights_beyond_the_range_of_f16_are_rejected(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("modern")
    network = run.network(run.checkpoint(), torch.device("cpu"))
    with torch.no_grad():
        network.head.weight[0, 0] = 1e5  # type: ignore[union-attr, index, operator]
    with pytest.raises(InputError, match=r"head\.weight does not fit in the range of f16"):
        huggingface.round_weights(network, "f16")
