"""Network architectures: `build` constructs all networks in the library, and `register` adds an architecture.

A new architecture needs a section of the recipe, a subclass of `tinylm.model.base.Model`, and one call:

    register(BigramSection, Bigram)
"""

from __future__ import annotations

from tinylm.errors import InputError
from tinylm.model import lora
from tinylm.model.base import Model
from tinylm.model.transformer import Transformer
from tinylm.recipe.schema import DecoderSection, LoraSection, ModelVariant, register_model_section, unregister_section

_NETWORKS: dict[type[ModelVariant], type[Model]] = {DecoderSection: Transformer}


def register(section: type[ModelVariant], network: type[Model]) -> None:
    """Add an architecture: `section` becomes a variant of `model:`, which `build` passes to `network`.

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
    """Return the class of the network that a section configures. Raises `InputError` if there is none."""
    if type(section) not in _NETWORKS:
        raise InputError(f"no network is registered for the architecture {section.architecture}", where="model.architecture")
    return _NETWORKS[type(section)]


def build(section: ModelVariant, vocab_size: int, seed: int | None, *, with_lora: LoraSection | None = None) -> Model:
    """Build the network that `section` configures, on the CPU or on the device of a `with torch.device(...)` block.

    `seed` determines its initial weights. Pass None to skip initialization if weights are loaded later. `with_lora` attaches LoRA
    weights, which is required before the weights of a LoRA run can be loaded.
    """
    network = network_class(section)(section, vocab_size, seed=seed)
    if with_lora is not None:
        lora.attach(network, with_lora)
    return network
