"""Encoders, classifiers and translators are inspected like decoders, and what is shown matches a plain forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import classifier_recipe
from pairs import REVERSE, network, reversed_pairs, write_jsonl
from tiny import ids

from tinylm.errors import InputError
from tinylm.inspection import attribution
from tinylm.inspection.input import InspectOptions
from tinylm.inspection.learning import select_checkpoints, view_checkpoints
from tinylm.inspection.overview import Inspection, inspect_text
from tinylm.inspection.page import PageOptions, collect, render
from tinylm.inspection.tour import MAX_WORDS, tour
from tinylm.model.classifier import SequenceClassifier
from tinylm.model.encoder_decoder import EncoderDecoder
from tinylm.model.sequence_to_sequence import START
from tinylm.pipeline import train
from tinylm.recipe import loads
from tinylm.reporting import SILENT
from tinylm.run import Run
from tinylm.translation.search import SearchOptions
from tinylm.translation.translator import Translator

SOURCE = "a b c d"
LABELED = "the plum and the grape"


@pytest.fixture(scope="module")
def translator(tmp_path_factory: pytest.TempPathFactory) -> Inspection:
    """Inspect a translator that was trained for a few steps to reverse letters."""
    folder = tmp_path_factory.mktemp("translator")
    pairs = write_jsonl(folder / "pairs.jsonl", reversed_pairs(60))
    train(loads(REVERSE.format(pairs=pairs, preset="transformer", steps=4), ["data.heldout.by=tail"]), folder / "run", device="cpu")
    return inspect_text(Run.open(folder / "run"), SOURCE, InspectOptions(translation="d c b a"))


OBJECTIVES = {
    "tanh": "",
    "mean": "objective: {name: classification, pool: mean, pooler: none}\n",
    "norm": "objective: {name: classification, pooler: gelu_norm}\n",
}


@pytest.fixture(scope="module", params=OBJECTIVES.values(), ids=OBJECTIVES)
def classifier(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Inspection:
    """Inspect a classifier with a pooling layer, and one without."""
    folder = tmp_path_factory.mktemp("classifier")
    train(classifier_recipe(folder, extra=request.param), folder / "run", device="cpu")
    return inspect_text(Run.open(folder / "run"), LABELED)


# Classifiers


def test_the_contributions_to_a_label_sum_to_its_logit(classifier: Inspection) -> None:
    inspected, model = classifier, classifier.forward.model
    assert isinstance(model, SequenceClassifier)
    with torch.no_grad():
        logits = model(inspected.forward.tokens)[0]
    assert inspected.attributed is not None
    assert inspected.attributed.target == model.objective.labels[int(logits.argmax())]
    assert inspected.attributed.logit == pytest.approx(float(logits.max()), abs=1e-5)
    assert inspected.attributed.sum == pytest.approx(inspected.attributed.logit, abs=1e-5)
    assert ("pooling bias" in dict(inspected.attributed.contributions)) == (model.objective.pooler == "tanh")


def test_the_last_row_of_the_label_lens_is_the_prediction(classifier: Inspection) -> None:
    inspected = classifier
    with torch.no_grad():
        expected = inspected.forward.model(inspected.forward.tokens)[0].softmax(-1)
    assert inspected.lens is not None
    assert inspected.lens.ids.shape == (2, 1, 3)
    torch.testing.assert_close(inspected.lens.probabilities[-1, 0], expected[inspected.lens.ids[-1, 0]])
    document = inspected.as_dict()
    assert document["labels"][0]["label"] == document["logit_lens"][-1][0][0]["label"]
    assert set(inspected.missing) == {"loss"}
    assert next(step.title for step in tour(inspected) if step.text.startswith("Not in this")) == "A sampled token"
    with pytest.raises(InputError, match="--target: 'plane' is not a label"):
        inspect_text(inspected.run, LABELED, InspectOptions(target="plane"))


# Translators


@pytest.mark.parametrize("preset", ["modern", "transformer"])
@pytest.mark.parametrize("norm_position", ["pre", "post", "output", "both"])
def test_contributions_with_cross_attention_sum_to_the_logit(preset: str, norm_position: str) -> None:
    model = network(preset, norm_position=norm_position)
    tokens, targets = ids(1, 7, vocab_size=40), ids(1, 7, seed=1, vocab_size=40)
    with torch.no_grad():
        memory = model.encode(ids(1, 5, vocab_size=40))
        with model.decoder.caching() as cache:
            hidden = model.decoder.hidden(tokens, memory=memory)
        expected = model.logits(hidden).gather(-1, targets[..., None])[..., 0]
    result = attribution(model.decoder, tokens, targets, cache=cache)
    torch.testing.assert_close(result.sums, expected, atol=2e-4, rtol=1e-4)
    assert {"L0H0", "L2X3"} <= set(result.components)


def test_a_given_translation_is_scored_and_aligned(translator: Inspection) -> None:
    model, source = translator.forward.model, translator.source
    assert isinstance(model, EncoderDecoder)
    assert source is not None
    target = translator.run.tokenizer.encode("d c b a")
    assert [token.id for token in translator.tokens] == [START, *target]
    reader = Translator.open(translator.run, device="cpu")
    framed = reader.framing.source(reader.framing.source_tokenizer.encode(SOURCE))
    with torch.no_grad():
        logits = model(torch.tensor([[START, *target]]), source=torch.from_numpy(framed)[None])[0]
    expected = -logits.log_softmax(-1)[range(len(target)), target]
    assert [token.loss for token in translator.tokens[1:]] == pytest.approx(expected.tolist(), abs=1e-5)
    assert translator.lens is not None
    assert translator.lens.ranks[-1, -1] > 0, "the end token follows the translation"
    attended = torch.from_numpy(reader.attention(framed, target).mean(axis=0))
    torch.testing.assert_close(source.alignment[:-1], attended, atol=1e-5, rtol=1e-5)


def test_without_a_translation_the_greedy_one_is_inspected(translator: Inspection) -> None:
    inspected = inspect_text(translator.run, SOURCE)
    [greedy] = Translator.open(translator.run, device="cpu").translate([SOURCE], SearchOptions(beams=1))
    assert (
        translator.run.tokenizer.decode([token.id for token in inspected.tokens[1:]]).split() == greedy.translations[0].text.split()
    )
    assert inspected.source is not None
    assert inspected.source.generated


def test_a_translator_is_viewed_at_all_checkpoints(translator: Inspection) -> None:
    given = translator.input
    [*_, last] = view_checkpoints(translator.run, given.ids, select_checkpoints(translator.run, "all"), given.source, device="cpu")
    assert last.losses == pytest.approx([token.loss for token in translator.tokens], abs=1e-5)
    assert len(tour(translator)) == 15
    assert all(len(step.text.split()) <= MAX_WORDS for step in tour(translator))


def test_options_for_translators_are_rejected_for_other_models(tiny_run: Run, translator: Inspection) -> None:
    with pytest.raises(InputError, match="--translation: requires a translation model"):
        inspect_text(tiny_run, "a b", InspectOptions(translation="c"))
    with pytest.raises(InputError, match="--corrupt: activation patching does not support translation models"):
        collect(translator, [], PageOptions(corrupt="a b c e"), SILENT)


# The page


def test_the_page_of_a_translator_shows_its_alignment(translator: Inspection, chromium: Any, tmp_path: Path) -> None:
    with _opened_page(chromium, translator, tmp_path) as page:
        assert "Not available: ablations are not measured for translation models" in page.inner_text("#p-effects")
        _check_translator(page, translator)


def test_the_page_of_a_classifier_shows_label_probabilities_by_layer(classifier: Inspection, chromium: Any, tmp_path: Path) -> None:
    with _opened_page(chromium, classifier, tmp_path) as page:
        assert "Not available: ablations are not measured for classifiers" in page.inner_text("#p-effects")
        shown = page.inner_text("#label-lens")
        assert all(label in shown for label in classifier.labels or ())


@contextmanager
def _opened_page(chromium: Any, inspected: Inspection, folder: Path) -> Iterator[Any]:
    """Open the page of an inspection on a small screen, and check that it fits and has no errors."""
    problems: list[str] = []
    file = folder / "page.html"
    file.write_text(render(inspected, []))
    with chromium.new_page(viewport={"width": 390, "height": 900}) as page:
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(file.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        yield page
    assert problems == []


def _check_translator(page: Any, inspected: Inspection) -> None:
    """Check the alignment table, and one cross-attention weight that is computed by hand."""
    assert inspected.source is not None
    shown = [int(cell) for cell in page.locator("#alignment td").all_inner_texts()]
    assert shown == pytest.approx((100 * inspected.source.alignment).flatten().tolist(), abs=0.51)
    page.locator("#cross-by-hand summary").click()
    steps = page.inner_text("#cross-by-hand ol")
    by_hand, computed = steps.split("the model computed ")
    assert float(by_hand.strip().rsplit(" = ", 1)[1]) == pytest.approx(float(computed.split(";")[0]), abs=2e-3)
