"""Importing a nanoGPT checkpoint never executes code from the file, and the model matches a reference implementation."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tinylm.errors import InputError
from tinylm.interchange.importing import import_model
from tinylm.reporting import CollectingReporter
from tinylm.run import Run
from tinylm.tokenizer import Tokenizer

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 24}


def weights(vocabulary: int, bias: bool) -> dict[str, Tensor]:
    """Return a random state dict with nanoGPT's parameter names. Linear weights have shape (out, in)."""
    torch.manual_seed(0)
    width = SHAPE["n_embd"]
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (vocabulary, width), "transformer.wpe.weight": (24, width)}
    for layer in range(SHAPE["n_layer"]):
        prefix = f"transformer.h.{layer}"
        inner = {"ln_1": (width,), "attn.c_attn": (3 * width, width), "attn.c_proj": (width, width), "ln_2": (width,)}
        for name, shape in {**inner, "mlp.c_fc": (4 * width, width), "mlp.c_proj": (width, 4 * width)}.items():
            shapes[f"{prefix}.{name}.weight"] = shape
            if bias:
                shapes[f"{prefix}.{name}.bias"] = shape[:1]
    shapes["transformer.ln_f.weight"] = (width,)
    if bias:
        shapes["transformer.ln_f.bias"] = (width,)
    state = {name: torch.randn(shape) * 0.3 for name, shape in shapes.items()}
    return {**state, "lm_head.weight": state["transformer.wte.weight"]}


def logits(state: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Compute the logits (B, T, V) of nanoGPT, a pre-norm GPT-2 with exact GELU, for `ids` (B, T)."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state.get(f"{name}.bias"), 1e-5)

    T = ids.shape[1]
    x = state["transformer.wte.weight"][ids] + state["transformer.wpe.weight"][:T]
    for layer in range(SHAPE["n_layer"]):
        prefix = f"transformer.h.{layer}"
        q, k, v = (
            part.view(*part.shape[:2], SHAPE["n_head"], -1).transpose(1, 2)
            for part in linear(norm(x, f"{prefix}.ln_1"), f"{prefix}.attn.c_attn").chunk(3, dim=-1)
        )
        scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(torch.ones(T, T).triu(1).bool(), float("-inf"))
        x = x + linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), f"{prefix}.attn.c_proj")
        x = x + linear(F.gelu(linear(norm(x, f"{prefix}.ln_2"), f"{prefix}.mlp.c_fc")), f"{prefix}.mlp.c_proj")
    return linear(norm(x, "transformer.ln_f"), "lm_head")


def save_checkpoint(path: Path, vocabulary: int, bias: bool = True, prefix: str = "") -> dict[str, Tensor]:
    state = weights(vocabulary, bias)
    saved: dict[str, Any] = {
        "model": {f"{prefix}{name}": tensor for name, tensor in state.items()},
        "model_args": {**SHAPE, "bias": bias, "vocab_size": vocabulary, "dropout": 0.0},
        "iter_num": 7,
        "best_val_loss": torch.tensor(3.2),
        "config": {"dataset": "shakespeare_char"},
    }
    torch.save(saved, path)
    return state


@pytest.mark.parametrize(("bias", "prefix"), [(True, ""), (False, "_orig_mod.")])
def test_an_imported_model_computes_the_reference_logits(
    bias: bool, prefix: str, tmp_path: Path, tokenizers: dict[str, Tokenizer]
) -> None:
    tokenizers["gpt2"].save(tmp_path / "tokenizer.json")
    state = save_checkpoint(tmp_path / "ckpt.pt", 448, bias, prefix)
    reporter = CollectingReporter()
    import_model(
        tmp_path / "ckpt.pt", tmp_path / "run", tokenizer=tmp_path / "tokenizer.json", trust_pickle=True, reporter=reporter
    )
    run = Run.open(tmp_path / "run")
    network = run.network(run.checkpoint(), torch.device("cpu"))
    ids = torch.randint(448, (2, 24))
    with torch.no_grad():
        torch.testing.assert_close(network(ids), logits(state, ids), atol=1e-5, rtol=1e-5)
    assert run.tokenizer.vocab_size == 448
    saved = run.checkpoint().state
    assert {saved[key] for key in ("val_loss", "val_bits_per_byte", "best_val_loss")} == {None}
    assert reporter.warnings == [
        "the imported model was not compared with the original, because transformers cannot read this format"
    ]


def test_special_tokens_missing_from_the_model_start_with_the_mean_embedding(
    tmp_path: Path, tokenizers: dict[str, Tokenizer]
) -> None:
    tokenizers["char"].save(tmp_path / "chars.json")
    characters = tokenizers["char"].vocab_size - 2
    state = save_checkpoint(tmp_path / "ckpt.pt", characters)
    reporter = CollectingReporter()
    import_model(tmp_path / "ckpt.pt", tmp_path / "run", tokenizer=tmp_path / "chars.json", trust_pickle=True, reporter=reporter)
    run = Run.open(tmp_path / "run")
    network = run.network(run.checkpoint(), torch.device("cpu"))
    ids = torch.randint(characters, (2, 24))
    with torch.no_grad():
        torch.testing.assert_close(network(ids)[..., :characters], logits(state, ids), atol=1e-5, rtol=1e-5)
    assert reporter.warnings[0].startswith("the model has no embedding for <|endoftext|>, <|unknown|>")


class Trap:
    """An object that creates the folder `$TRAP` when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["TRAP"],)


def test_code_in_a_pickle_is_never_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAP", str(tmp_path / "executed"))
    torch.save({"model": Trap()}, tmp_path / "ckpt.pt")
    with pytest.raises(InputError, match="is a pickle, and loading a pickle can execute code"):
        import_model(tmp_path / "ckpt.pt", tmp_path / "run")
    with pytest.raises(InputError, match="objects other than tensors and plain values"):
        import_model(tmp_path / "ckpt.pt", tmp_path / "run", trust_pickle=True)
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]


def test_files_that_are_not_nanogpt_checkpoints_are_rejected(tmp_path: Path) -> None:
    for name, content, message in (
        ("notes.txt", b"hello", "neither a Hugging Face folder, a torch.save file nor an ARPA file"),
        ("empty.pt", b"", "neither a Hugging Face folder"),
        ("model.safetensors", b"", "a weights file alone does not contain the model configuration"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message):
            import_model(tmp_path / name, tmp_path / "run", trust_pickle=True)
    torch.save({"state": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(InputError, match="not a nanoGPT checkpoint"):
        import_model(tmp_path / "other.pt", tmp_path / "run", trust_pickle=True)
    save_checkpoint(tmp_path / "ckpt.pt", 300)
    with pytest.raises(InputError, match="does not include a tokenizer"):
        import_model(tmp_path / "ckpt.pt", tmp_path / "run", trust_pickle=True)
