"""ONNX export, checked with onnxruntime."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from untrained_runs import CONTEXT, MakeRun

from tinylm.errors import WorkError
from tinylm.interchange import onnx
from tinylm.interchange.exporting import export
from tinylm.model import registry
from tinylm.recipe.encoder import EncoderSection
from tinylm.recipe.labels import ClassificationObjective


def test_an_onnx_file_accepts_any_batch_size_and_length(make_run: MakeRun, tmp_path: Path) -> None:
    _, _, onnxruntime = (pytest.importorskip(name) for name in ("onnx", "onnxscript", "onnxruntime"))
    run = make_run("modern", ngram_embeddings=[2, 3], n_kv_head=2, shifted_key_heads=1, value_residual=True, tokenizer="digits2")
    result = export(run, "onnx", tmp_path / "model.onnx")
    assert result.largest_difference <= 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    assert [(node.name, node.shape) for node in session.get_inputs()] == [("input_ids", ["batch", "time"])]
    network = run.network(run.checkpoint(), torch.device("cpu"))
    for shape in ((1, 1), (4, 2), (2, CONTEXT)):
        ids = torch.randint(network.vocab_size, shape)
        logits = torch.from_numpy(session.run(None, {"input_ids": ids.numpy()})[0])
        with torch.no_grad():
            torch.testing.assert_close(logits, network(ids), atol=1e-4, rtol=0)
    assert session.get_modelmeta().custom_metadata_map["context_length"] == str(CONTEXT)

    with torch.no_grad():
        network.final_norm.weight.mul_(1.01)  # type: ignore[operator, union-attr]
    with pytest.raises(WorkError, match="the ONNX file does not match the original model"):
        onnx.check_export(tmp_path / "model.onnx", network, run.tokenizer, "The for statement is used to iterate.")


def test_the_graph_of_a_classifier_pools_the_last_token_and_masks_by_window_in_every_shape(tmp_path: Path) -> None:
    _, _, onnxruntime = (pytest.importorskip(name) for name in ("onnx", "onnxscript", "onnxruntime"))
    window = {"attention_window": 3, "rope_theta_local": 500.0}
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "context_length": CONTEXT}
    model = EncoderSection.model_validate({"feed_forward": "geglu_exact", "position": "rope", **window, **sizes})
    objective = ClassificationObjective(pool="last", labels=("no", "yes"))
    network = registry.build(model, 20, 0, objective=objective).eval()
    onnx.write(tmp_path / "model.onnx", network, "classifier")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for batch, length in ((1, 1), (3, 2), (5, CONTEXT)):
        ids = torch.randint(network.vocab_size, (batch, length))
        mask = (torch.arange(length) <= torch.arange(batch)[:, None]).long()
        logits = torch.from_numpy(session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0])
        with torch.no_grad():
            torch.testing.assert_close(logits, network(ids, segments=mask - 1), atol=1e-5, rtol=0)
