"""Translate texts with a trained model: `Translator` converts sentences to token ids, finds translations and decodes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from tinylm import device as devices
from tinylm.data.bucketed_pairs import PairFraming
from tinylm.data.pairs import SOURCE_TOKENIZER
from tinylm.errors import InputError
from tinylm.model import compiled_translation
from tinylm.model.compiled_translation import CompiledTranslation
from tinylm.model.sequence_to_sequence import START, SequenceToSequence
from tinylm.model.translation_records import TRANSLATION_STEP
from tinylm.run import Checkpoint, Run
from tinylm.tokenizer import Tokenizer
from tinylm.translation.search import DEFAULT_BATCH, Hypothesis, SearchOptions, translate_ids

_MIN_PARAMETERS = 1_000_000
"""Minimum number of parameters for which the decoding step is compiled. Smaller models are fast enough."""
_MIN_SENTENCES = 1000
"""Minimum number of sentences for which compiling the decoding step saves more time than it takes."""


@dataclass(frozen=True)
class TranslatedText:
    """One translation of a sentence."""

    text: str
    score: float
    """Log-probability in nats divided by the length penalty. Higher is better."""
    logprob: float
    tokens: int
    """Number of tokens, including the end token if there is one."""
    finish_reason: str
    """`end`, or `length` if the translation reached the maximum length."""


@dataclass(frozen=True)
class AlignedToken:
    """A token of a translation, and the source token that the decoder attended to most when it predicted this token."""

    token: str
    source: str
    weight: float


@dataclass(frozen=True)
class Translation:
    """A sentence and its translations, best first."""

    source: str
    translations: tuple[TranslatedText, ...]
    note: str | None = None
    """Set if the sentence is empty, or if it was too long and was truncated."""
    alignment: tuple[AlignedToken, ...] | None = None
    """The alignment of the best translation, if it was requested."""


@dataclass(frozen=True)
class Translator:
    """A translation model with its tokenizers."""

    network: SequenceToSequence
    framing: PairFraming

    @classmethod
    def open(cls, run: Run, checkpoint: str | None = None, *, device: str = "auto", average: int = 1) -> Translator:
        """Load a run's translator. If `average` is greater than 1, the weights are the mean of the last `average` checkpoints.

        Raises `InputError` if the run was not trained for translation or does not have enough checkpoints.
        """
        require_translation_run(run)
        target = devices.resolve(device)
        network = run.network(run.checkpoint(checkpoint), target) if average == 1 else averaged_network(run, average, target)
        assert isinstance(network, SequenceToSequence)
        return cls(network, PairFraming(source_tokenizer_of(run), run.tokenizer, network.model.context_length))

    def translate(
        self,
        texts: Sequence[str],
        options: SearchOptions = SearchOptions(),
        *,
        language: str = "",
        batch_size: int = DEFAULT_BATCH,
        align: bool = False,
        on_batch: Callable[[int], None] = lambda sentences: None,
    ) -> list[Translation]:
        """Translate sentences. A translation never depends on the other sentences.

        The translation of an empty sentence is empty. A sentence that is longer than the context is truncated. `language` is the
        target language, if the model has several. `align` adds an alignment to the best translation of each sentence. Raises
        `InputError` if an option is invalid or the language is unknown.
        """
        options.check()
        self.check_language(language)
        notes, sources, indexes = self._prepare(texts, language)
        found = translate_ids(
            self.network,
            sources,
            self.framing.target_end,
            options,
            batch_size=batch_size,
            compiled=self._compiled,
            on_batch=on_batch,
        )
        empty = (TranslatedText("", 0.0, 0.0, 0, "end"),)
        results = [Translation(text, empty, note) for text, note in zip(texts, notes, strict=True)]
        for index, source, hypotheses in zip(indexes, sources, found, strict=True):
            translated = tuple(self._decode(hypothesis) for hypothesis in hypotheses)
            alignment = self._align(source, hypotheses[0]) if align else None
            results[index] = Translation(texts[index], translated, notes[index], alignment)
        return results

    @property
    def could_be_compiled(self) -> bool:
        """Whether compiled decoding would save much time, but the code has not been compiled on this machine."""
        is_large = self.network.parameter_count() >= _MIN_PARAMETERS
        return is_large and compiled_translation.is_supported(self.network) and not TRANSLATION_STEP.is_compiled()

    def compile(self, report: Callable[[str], None], *, sentences: int | None = None) -> None:
        """Compile the decoding step, if that saves time for this number of sentences (None: unlimited).

        Call this before the first translation. Otherwise, `translate` uses compiled code only if it has been compiled on this
        machine before. Compiled code is faster, and its scores can differ in the last bits.
        """
        if self.could_be_compiled and (sentences is None or sentences >= _MIN_SENTENCES):
            compiled_translation.load_code(report)

    @cached_property
    def _compiled(self) -> CompiledTranslation | None:
        """The compiled decoder, or None if it is not supported or has not been compiled. Does not depend on the sentences."""
        supported = compiled_translation.is_supported(self.network) and TRANSLATION_STEP.is_compiled()
        return CompiledTranslation(self.network) if supported else None

    def check_language(self, language: str) -> None:
        """Raise `InputError` if `language` is unknown, or if it is empty although the model has several target languages."""
        languages = self.framing.languages
        if languages and not language:
            hint = f"choose one with --to: {', '.join(languages)}"
            raise InputError("the model translates into several languages", where="--to", hint=hint)
        self.framing.language_ids(language)

    def _prepare(self, texts: Sequence[str], language: str) -> tuple[list[str | None], list[np.ndarray], list[int]]:
        """Return the note for each text, and the source ids (with special tokens) and the index of each nonempty text."""
        notes: list[str | None] = []
        sources, indexes = [], []
        room = self.framing.context_length - len(self.framing.source([], language))
        for index, text in enumerate(texts):
            ids = self.framing.source_tokenizer.encode(" ".join(text.split()))
            if not ids:
                notes.append("empty")
                continue
            notes.append(f"truncated from {len(ids):,} to {room:,} tokens" if len(ids) > room else None)
            sources.append(self.framing.source(ids[:room], language))
            indexes.append(index)
        return notes, sources, indexes

    def _decode(self, hypothesis: Hypothesis) -> TranslatedText:
        # A translation must be a single line, even if the model generates line breaks.
        text = " ".join(self.framing.target_tokenizer.decode(hypothesis.ids).split())
        reason = "end" if hypothesis.finished else "length"
        tokens = len(hypothesis.ids) + hypothesis.finished
        return TranslatedText(text, hypothesis.score, hypothesis.logprob, tokens, reason)

    def _align(self, source: np.ndarray, hypothesis: Hypothesis) -> tuple[AlignedToken, ...]:
        """For each target token, return the source token with the largest attention weight, averaged over the heads."""
        pattern = self.attention(source, hypothesis.ids).mean(axis=0)  # (T, S)
        source_tokens = [_shown(self.framing.source_tokenizer, int(id)) for id in source]
        chosen = pattern.argmax(axis=1)
        return tuple(
            AlignedToken(_shown(self.framing.target_tokenizer, id), source_tokens[chosen[i]], float(pattern[i, chosen[i]]))
            for i, id in enumerate(hypothesis.ids)
        )

    def attention(self, source: np.ndarray, ids: Sequence[int]) -> np.ndarray:
        """Return the decoder's attention weights for `ids`, of shape (heads, target tokens, source tokens).

        Raises `InputError` if the model has no attention.
        """
        device = self.network.device
        with torch.inference_mode():
            tokens = torch.tensor([START, *ids[:-1]] if ids else [START], device=device)
            weights = self.network.attention_weights(torch.as_tensor(source, device=device), tokens)
        pattern: np.ndarray = weights[:, : len(ids)].cpu().numpy()
        return pattern


def require_translation_run(run: Run) -> None:
    """Raise `InputError` if a run was not trained for translation."""
    if run.recipe.objective.name != "translation":
        problem = f"was trained with the {run.recipe.objective.name} objective, so it cannot translate"
        hint = "train a translation model, for example with `tinylm train translate-de-en`"
        raise InputError(problem, where=str(run.path), hint=hint)


def source_tokenizer_of(run: Run) -> Tokenizer:
    """Return the tokenizer for the source language of a translation run."""
    files = (folder / SOURCE_TOKENIZER for folder in (run.path / "heldout", run.path))  # the latter in imported runs
    own = next((file for file in files if file.exists()), None)
    return run.tokenizer if own is None else Tokenizer.load(own)


def averaged_network(run: Run, count: int, device: torch.device) -> SequenceToSequence:
    """Return the network with the mean weights of the last `count` checkpoints. Raises `InputError` if there are fewer."""
    checkpoints: list[Checkpoint] = run.checkpoints()[-count:]
    if count < 1 or len(checkpoints) < count:
        hint = "average fewer checkpoints, or keep more of them with checkpoint.keep"
        raise InputError(f"cannot average {count} checkpoints: the run has {len(run.checkpoints())}", where="--average", hint=hint)
    networks = [run.network(checkpoint, device) for checkpoint in checkpoints]
    weights = [network.stored_weights() for network in networks]
    mean = {name: torch.stack([each[name].double() for each in weights]).mean(dim=0).float() for name in weights[0]}
    networks[0].load_stored_weights(mean)
    assert isinstance(networks[0], SequenceToSequence)
    return networks[0]


def _shown(tokenizer: Tokenizer, id: int) -> str:
    return tokenizer.token_bytes[id].decode("utf-8", "replace").strip() or str(tokenizer.backend.id_to_token(id))
