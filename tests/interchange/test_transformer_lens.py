"""Attention patterns, residual streams, the logit lens and attributions agree with TransformerLens."""

from __future__ import annotations

import sys

import pytest
from tiny import ids, model

from tinylm.errors import InputError
from tinylm.interchange import transformer_lens
from tinylm.run import Run


@pytest.mark.parametrize("preset", ["gpt2", "llama"])
def test_activations_agree_with_transformer_lens(preset: str, tiny_run: Run) -> None:
    pytest.importorskip("transformer_lens", reason="transformer-lens is not installed")
    size = tiny_run.tokenizer.vocab_size
    network = model(preset, vocab_size=size, context_length=32)
    differences = transformer_lens.largest_differences(network, tiny_run.tokenizer, ids(1, 24, vocab_size=size)[0].tolist())
    assert set(differences) == {"patterns", "residuals", "logit lens", "attribution"}
    assert max(differences.values()) < 1e-4, differences


def test_a_missing_installation_is_reported(tiny_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformer_lens, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"--verify: needs transformer-lens \(pip install transformer-lens\)"):
        transformer_lens.largest_differences(model("gpt2"), tiny_run.tokenizer, [1, 2])


def test_a_model_without_a_transformers_class_is_rejected(tiny_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformer_lens, "find_spec", lambda name: sys)
    with pytest.raises(InputError, match="TransformerLens cannot load a model with"):
        transformer_lens.largest_differences(model("modern"), tiny_run.tokenizer, [1, 2])
