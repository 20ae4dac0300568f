"""Marian folders with SentencePiece models, such as Helsinki-NLP/opus-mt-de-en, can be imported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tinylm.errors import InputError
from tinylm.interchange.importing import import_model
from tinylm.run import Run
from tinylm.translation.search import SearchOptions
from tinylm.translation.translator import Translator

spm = pytest.importorskip("sentencepiece")
transformers = pytest.importorskip("transformers")

GERMAN = "Die Straße ist lang und der Kuchen ist süß. Guten Tag, wie heißt du? Ich heiße Bär und esse gern Brötchen. "
ENGLISH = "The street is long and the cake is sweet. Hello, what is your name? My name is Bear and I like to eat rolls. "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as Marian models on the Hugging Face Hub have it, with random weights."""
    path: Path = tmp_path_factory.mktemp("marian")
    pieces: list[str] = []
    for side, text in (("source", GERMAN), ("target", ENGLISH)):
        (path / "text").write_text(text.replace(". ", ".\n").replace("? ", "?\n"), encoding="utf-8")
        spm.SentencePieceTrainer.train(
            input=str(path / "text"), model_prefix=str(path / side), vocab_size=60, hard_vocab_limit=False, minloglevel=2
        )
        (path / f"{side}.model").rename(path / f"{side}.spm")
        model = spm.SentencePieceProcessor(model_file=str(path / f"{side}.spm"))
        pieces += [model.id_to_piece(id) for id in range(3, len(model))]
    words = ["</s>", "<unk>", ">>eng<<", *dict.fromkeys(reversed(pieces)), "<pad>"]
    (path / "vocab.json").write_text(json.dumps({word: id for id, word in enumerate(words)}), encoding="utf-8")
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "MarianTokenizer"}), encoding="utf-8")
    pad = len(words) - 1
    layers: dict[str, Any] = {"d_model": 16, "max_position_embeddings": 48, "activation_function": "swish", "scale_embedding": True}
    for stack in ("encoder", "decoder"):
        layers |= {f"{stack}_layers": 1, f"{stack}_attention_heads": 2, f"{stack}_ffn_dim": 24}
    special = {"pad_token_id": pad, "eos_token_id": 0, "decoder_start_token_id": pad, "forced_eos_token_id": None}
    torch.manual_seed(0)
    network = transformers.MarianMTModel(transformers.MarianConfig(vocab_size=len(words), **layers, **special))
    with torch.no_grad():
        network.model.shared.weight.normal_()
        network.model.shared.weight[pad] = 0.0
    network.save_pretrained(path)
    return path


def test_ids_and_translations_are_those_of_transformers(folder: Path, tmp_path: Path) -> None:
    result = import_model(folder, tmp_path / "run")
    assert result.largest_difference is not None
    assert result.largest_difference < 1e-4
    translator = Translator.open(Run.open(tmp_path / "run"), device="cpu")
    reference = transformers.MarianTokenizer.from_pretrained(folder)
    network = transformers.MarianMTModel.from_pretrained(folder).eval()
    framing = translator.framing
    assert framing.languages == ["eng"]
    sentences = ["Der Kuchen ist süß.", "  Guten   Tag ", "Straßenbär?", "the street", "日本 x"]
    for sentence in sentences:
        with_end = reference(f">>eng<< {sentence}")["input_ids"]
        assert framing.source(framing.source_tokenizer.encode(sentence), "eng").tolist() == with_end
    for sentence in ("The cake is sweet.", "what"):
        assert framing.target(framing.target_tokenizer.encode(sentence)).tolist() == reference(text_target=sentence)["input_ids"]
    options = SearchOptions(beams=3, length_penalty=0.0, max_length=20)
    for sentence, ours in zip(sentences, translator.translate(sentences, options, language="eng"), strict=True):
        ids = reference(f">>eng<< {sentence}", return_tensors="pt")
        limits = {"max_length": None, "max_new_tokens": 20, "bad_words_ids": [[network.config.pad_token_id]]}
        found = network.generate(**ids, num_beams=3, length_penalty=0.0, **limits)
        assert ours.translations[0].text == " ".join(reference.decode(found[0], skip_special_tokens=True).split())


def test_a_vocabulary_without_one_id_for_each_token_is_an_error(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "vocab.json").write_text('{"</s>": 0, "<unk>": 2}', encoding="utf-8")
    with pytest.raises(InputError, match=r"vocab\.json: does not contain one id for each token"):
        import_model(copy, tmp_path / "run")
