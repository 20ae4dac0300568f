"""Network architectures: `build` constructs all networks in the library, and `register` adds an architecture.

A new architecture needs a recipe section, a subclass of `tinylm.model.base.Model`, and one call:

    register(BigramSection, Bigram)
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from tinylm.errors import InputError
from tinylm.model import lora
from tinylm.model.base import Model
from tinylm.model.classifier import SequenceClassifier
from tinylm.model.encoder import Encoder
from tinylm.model.encoder_decoder import EncoderDecoder
from tinylm.model.ngram_model import Ngram
from tinylm.model.recurrent import Recurrent
from tinylm.model.recurrent_encoder_decoder import RecurrentEncoderDecoder
from tinylm.model.sequence_to_sequence import SequenceToSequence
from tinylm.model.transformer import Transformer
from tinylm.model.window import WindowNetwork
from tinylm.recipe.encoder import EncoderSection
from tinylm.recipe.encoder_decoder import EncoderDecoderSection
from tinylm.recipe.fixed_context import FeedForwardSection, NgramSection
from tinylm.recipe.labels import ClassificationObjective
from tinylm.recipe.pairs import TranslationObjective
from tinylm.recipe.recurrent import GruSection, LstmSection, RecurrentEncoderDecoderSection, RnnSection
from tinylm.recipe.schema import (
    DecoderSection,
    LoraSection,
    ModelVariant,
    ObjectiveVariant,
    register_model_section,
    unregister_section,
)

_NETWORKS: dict[type[ModelVariant], type[Model]] = {
    RnnSection: Recurrent,
    LstmSection: Recurrent,
    GruSection: Recurrent,
    FeedForwardSection: WindowNetwork,
    NgramSection: Ngram,
    DecoderSection: Transformer,
    EncoderSection: Encoder,
    EncoderDecoderSection: EncoderDecoder,
    RecurrentEncoderDecoderSection: RecurrentEncoderDecoder,
}


def register(section: type[ModelVariant], network: type[Model]) -> None:
    """Add an architecture: recipes can select `section` in `model:`, and `build` constructs a `network` for it.

    The constructor is called as `network(section, vocab_size, seed=seed)`. Raises `ValueError` if the architecture already exists,
    or if `section` does not have the key `context_length`.
    """
    register_model_section(section)
    _NETWORKS[section] = network


def unregister(section: type[ModelVariant]) -> None:
    """Remove an architecture that `register` added."""
    unregister_section(section)
    del _NETWORKS[section]


def network_class(section: ModelVariant) -> type[Model]:
    """Return the network class for a section. Raises `InputError` if none is registered."""
    if type(section) not in _NETWORKS:
        raise InputError(f"no network is registered for the architecture {section.architecture}", where="model.architecture")
    return _NETWORKS[type(section)]


def build(
    section: ModelVariant,
    vocab_size: int,
    seed: int | None,
    *,
    objective: ObjectiveVariant | None = None,
    with_lora: LoraSection | None = None,
) -> Model:
    """Build the network that `section` configures, on the CPU or on the device of a `with torch.device(...)` block.

    `seed` determines the initial weights. Pass None to skip initialization when weights are loaded later. `objective` is the
    recipe's objective: classification replaces the head, and translation sets the size of a separate source vocabulary. `with_lora`
    attaches LoRA weights. Set it before loading the weights of a LoRA run.
    """
    network_type = network_class(section)
    if issubclass(network_type, SequenceToSequence) and isinstance(objective, TranslationObjective):
        network: Model = network_type(section, vocab_size, seed=seed, source_vocab_size=objective.source_vocab_size)
    else:
        network = network_type(section, vocab_size, seed=seed)
    if isinstance(objective, ClassificationObjective):
        network = SequenceClassifier(network, objective, seed=seed)
    if with_lora is not None:
        lora.attach(network, with_lora)
    return network


def build_without_weights(
    section: ModelVariant,
    vocab_size: int,
    *,
    objective: ObjectiveVariant | None = None,
    with_lora: LoraSection | None = None,
) -> Model:
    """Build a network on the meta device, where weights have shapes but no values. See `build`."""
    with torch.device("meta"), _SkipNormal():
        return build(section, vocab_size, None, objective=objective, with_lora=with_lora)


class _SkipNormal(TorchFunctionMode):
    """Skip `torch.nn.init.normal_`, which has no effect on the meta device but imports torch's compiler (1 to 2 s)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return None if func is torch.nn.init.normal_ else func(*args, **(kwargs or {}))
