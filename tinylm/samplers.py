"""Generate samples during training. The objective determines the kind: text, filled masks, labels, translations or chat answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from tinylm.data.bucketed_pairs import PairFraming
from tinylm.data.framing import Framing
from tinylm.errors import InputError
from tinylm.evaluation import classification
from tinylm.evaluation.filling import fill
from tinylm.generation.chat import ChatSession, chat_prompt
from tinylm.generation.engine import generate
from tinylm.generation.sampling import SamplingOptions
from tinylm.model.base import Model
from tinylm.model.classifier import SequenceClassifier
from tinylm.model.decoder import as_decoder
from tinylm.model.sequence_to_sequence import SequenceToSequence
from tinylm.recipe import Recipe
from tinylm.recipe.chat import ChatSection, PreferencesSection
from tinylm.recipe.encoder import MaskedLMObjective
from tinylm.recipe.labels import ClassificationObjective
from tinylm.recipe.pairs import TranslationObjective
from tinylm.recipe.schema import ObjectiveVariant
from tinylm.text.conversations import USER, Message
from tinylm.tokenizer import Tokenizer
from tinylm.tokenizer.chat_template import ChatEncoder, ChatTemplate
from tinylm.tokenizer.control_tokens import encode_with_masks
from tinylm.translation.translator import Translator

Samples = Iterator[tuple[str, str]]
"""Pairs of a prompt and the model's output for it."""


def generated_text(network: Model, tokenizer: Tokenizer, recipe: Recipe) -> Samples:
    """Continue each prompt."""
    section = recipe.sampling
    options = SamplingOptions(section.max_new_tokens, section.temperature, section.top_k)
    for prompt in section.prompts:
        yield prompt, generate(network, tokenizer, prompt, options, seed=recipe.seed)[0].text


def filled_masks(network: Model, tokenizer: Tokenizer, recipe: Recipe) -> Samples:
    """Fill the masks in each prompt with the most likely tokens."""
    for prompt in recipe.sampling.prompts:
        filled = fill(network, tokenizer, prompt, top=3)
        candidates = [", ".join(f"{c.token!r} {c.probability:.1%}" for c in mask.candidates) for mask in filled.masks]
        yield prompt, f"\n{filled.filled}\n" + "\n".join(candidates)


def classified_texts(network: Model, tokenizer: Tokenizer, recipe: Recipe) -> Samples:
    """Predict the label of each prompt."""
    assert isinstance(network, SequenceClassifier)
    framing = Framing.of(tokenizer, network.model)
    for prompt in recipe.sampling.prompts:
        logits = classification.predict(network, [np.array(tokenizer.encode(prompt), dtype=np.int64)], framing)
        probabilities = np.exp(classification.log_softmax(logits))[0]
        best = int(probabilities.argmax())
        yield prompt, f" -> {network.objective.labels[best]} ({probabilities[best]:.1%})"


def translated_texts(network: Model, tokenizer: Tokenizer, recipe: Recipe) -> Samples:
    """Translate each prompt."""
    assert isinstance(network, SequenceToSequence)
    translator = Translator(network, PairFraming(tokenizer, tokenizer, network.model.context_length))
    for result in translator.translate(recipe.sampling.prompts):
        yield result.source, f" -> {result.translations[0].text}"


def chat_answers(network: Model, tokenizer: Tokenizer, recipe: Recipe) -> Samples:
    """Answer each prompt as the first message of a conversation."""
    section, decoder = recipe.sampling, as_decoder(network)
    options = SamplingOptions(section.max_new_tokens, section.temperature, section.top_k)
    encoder = ChatEncoder(ChatTemplate(), tokenizer)
    for prompt in section.prompts:
        sample, _ = ChatSession(decoder, encoder, options, recipe.seed).ask(prompt)
        yield prompt, f"\n{sample.text}"


_SAMPLERS: dict[type[ObjectiveVariant], Callable[[Model, Tokenizer, Recipe], Samples]] = {
    MaskedLMObjective: filled_masks,
    ClassificationObjective: classified_texts,
    TranslationObjective: translated_texts,
}


def check_prompts(tokenizer: Tokenizer, recipe: Recipe) -> None:
    """Raise `InputError` if a prompt does not fit into the context. Only masked texts and chat messages must fit."""
    section = recipe.sampling
    for prompt in section.prompts if section.every is not None else ():
        where = f"sampling.prompts: {prompt[:40]!r}"
        if isinstance(recipe.data, ChatSection | PreferencesSection):
            encoder = ChatEncoder(ChatTemplate(), tokenizer)
            try:
                chat_prompt([Message(USER, prompt)], encoder, recipe.model.context_length, section.max_new_tokens)
            except InputError as error:
                raise InputError(error.message, where=where, hint=error.hint) from None
        elif isinstance(recipe.objective, MaskedLMObjective):
            length, room = len(encode_with_masks(tokenizer, prompt)), Framing.of(tokenizer, recipe.model).room
            if length > room:
                raise InputError(f"has {length} tokens, but only {room} fit into the context", where=where, hint="shorten it")


def samples(network: Model, tokenizer: Tokenizer, recipe: Recipe) -> Samples:
    """Yield samples for the recipe's prompts. An objective without its own sampler continues the prompts."""
    if isinstance(recipe.data, ChatSection | PreferencesSection):
        yield from chat_answers(network, tokenizer, recipe)
        return
    yield from _SAMPLERS.get(type(recipe.objective), generated_text)(network, tokenizer, recipe)
