"""`Model`: the interface through which training, evaluation, generation and export use a network of any architecture.

To add an architecture, subclass `Model`, implement at least `hidden` and `logits`, and register the class with
`registry.register`. All other methods have defaults, and code outside `tinylm.model` does not depend on the class.

Legend: `B` batch, `T` time, `C` width, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinylm.errors import InputError
from tinylm.model.functions import Teacher, distillation_loss
from tinylm.model.hooks import HookedModule
from tinylm.recipe.schema import ModelVariant, ObjectiveVariant

BODY = "body."
"""Prefix for the weight names of a classifier's body, which is the network without its head."""


class Model(HookedModule):
    """A network that predicts tokens. `model` is its section of the recipe.

    Set `recompute` to enable activation checkpointing. A model that saves no large activations can ignore this attribute. Set
    `compile_loss` to allow compiling the loss, and the attention within segments, on a GPU.
    """

    def __init__(self, model: ModelVariant, vocab_size: int, *, seed: int | None = 0) -> None:
        """`seed` determines the initial weights. Pass None to skip initialization when weights are loaded later."""
        super().__init__()
        self.model = model
        self.vocab_size = vocab_size
        self.recompute = False
        self.compile_loss = False

    @property
    def is_causal(self) -> bool:
        """Whether the output at each position depends only on that position and earlier ones."""
        return not self.model.bidirectional

    @property
    def objective(self) -> ObjectiveVariant | None:
        """The objective whose output layer replaces the language-model head, or None if the model predicts tokens."""
        return None

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters()).device

    def parameter_count(self) -> int:
        """Number of parameters, including frozen parameters. Tied weights are counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    # Computation.

    def hidden(self, tokens: Tensor, *, n_last: int | None = None, segments: Tensor | None = None) -> Tensor:
        """Ids (B, T) -> final hidden states (B, T, C), the input of `logits`. `n_last`: return only the last `n_last` positions.

        `segments` (B, T): see `Batch`. Raises `ValueError` if T is larger than the context length.
        """
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (..., V)."""
        raise NotImplementedError

    def finish(self, residual: Tensor) -> Tensor:
        """Return the final hidden states (..., C) of a model whose last block outputs `residual` (..., C).

        Raises `InputError` if the model has no residual stream.
        """
        raise InputError(f"a model with the {self.architecture} architecture has no residual stream")

    def unembed(self, residual: Tensor) -> Tensor:
        """Return the logits (..., V) that the model would compute if `residual` (..., C) were the output of its last block.

        Raises `InputError` if the model has no residual stream.
        """
        return self.logits(self.finish(residual))

    def forward(
        self,
        tokens: Tensor,
        *,
        targets: Tensor | None = None,
        segments: Tensor | None = None,
        teacher: Teacher | None = None,
    ) -> Tensor:
        """Ids (B, T) -> logits (B, T, V), or, with `targets` (B, T), the summed loss in nats (a scalar).

        Negative targets are ignored. `segments`: see `hidden`. `teacher`: see `summed_cross_entropy`.
        """
        logits = self.logits(self.hidden(tokens, segments=segments))
        if targets is None:
            return logits
        if teacher is not None:
            return distillation_loss(logits.flatten(0, -2), targets.flatten(), teacher)
        ids = targets.flatten().long().clamp_min(-1)
        return F.cross_entropy(logits.flatten(0, -2).float(), ids, ignore_index=-1, reduction="sum")

    # Training.

    def compile_units(self) -> Sequence[nn.Module]:
        """Return the modules to compile and shard separately, in order. If there are none, the whole model is one unit."""
        return ()

    def compile_stacks(self) -> Sequence[nn.Module]:
        """Return modules that run all compile units, such as a stack of blocks. `training.compile: model` compiles each of them."""
        return ()

    def muon_weights(self) -> list[str]:
        """Return the names of the matrices that Muon updates: the weights of all linear layers except `head` and tied weights."""
        linears = (f"{name}.weight" for name, module in self.named_modules() if isinstance(module, nn.Linear) and name != "head")
        return [name for name in linears if name not in self.tied_weights()]

    def stacked_matrices(self) -> dict[str, tuple[int, ...]]:
        """Map the name of each parameter that stacks several matrices to the number of rows in each matrix."""
        return {}

    def lr_multipliers(self) -> dict[str, float]:
        """Map parameter names to learning-rate multipliers. The default multiplier is 1."""
        return {}

    # Saving and loading.

    def tied_weights(self) -> dict[str, str]:
        """Map the name of each weight that is not stored to the name of the stored weight that shares its memory."""
        return {}

    def stored_weights(self) -> dict[str, Tensor]:
        """Return the detached weights that a checkpoint stores, by name."""
        tied = self.tied_weights()
        return {name: tensor.detach() for name, tensor in self.state_dict().items() if name not in tied}

    def load_stored_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Load weights named as in `stored_weights`. Raises `RuntimeError` if names or shapes differ."""
        tied = {name: weights[stored] for name, stored in self.tied_weights().items() if stored in weights}
        self.load_state_dict({**weights, **tied})

    def stored_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Return the shapes that a file's weights must have. `shapes` are the shapes found in the file.

        By default, the shapes must match this network. Override this method if the model's size depends on its training text.
        """
        return {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}

    @classmethod
    def check_size(cls, model: ModelVariant, names: Iterable[str]) -> str | None:
        """Return the reason that weights with these names cannot belong to `model`, or None if they can.

        Called before the network of an untrusted recipe is built, so that a huge number of layers takes no time or memory.
        """
        return None

    def vocabulary_weights(self) -> frozenset[str]:
        """Return the names of the weights that depend on the vocabulary and do not fit a model with a different tokenizer."""
        return frozenset()

    def head_weights(self) -> frozenset[str]:
        """Return the names of the output head's weights, which `init_from: {head: off}` does not load."""
        return frozenset()

    def remove_head(self) -> None:
        """Remove the output head. The network then computes only hidden states."""
        for name in {weight.split(".")[0] for weight in self.head_weights()}:
            delattr(self, name)

    def fit_pretrained(self, name: str, weight: Tensor) -> Tensor:
        """Crop a compatible pretrained model's weight to the part that this model uses."""
        return weight

    # Inspection.

    def input_embedding(self) -> nn.Embedding:
        """The embedding of input tokens, (V, C). Raises `InputError` if the model has none."""
        raise InputError(f"a model with the {self.architecture} architecture has no input embedding")

    def output_embedding(self) -> nn.Linear:
        """The output projection, (V, C). Raises `InputError` if the model has none."""
        raise InputError(f"a model with the {self.architecture} architecture has no output projection")

    @property
    def depth(self) -> int:
        """The number of blocks whose hook points are named `blocks.{i}.resid_pre` and `blocks.{i}.resid_post`."""
        return 0

    @property
    def architecture(self) -> str:
        """The value of `model.architecture` in the recipe."""
        return self.model.architecture


@contextmanager
def evaluation_mode(network: Model) -> Iterator[None]:
    """Put the network in evaluation mode for the duration of the `with` block."""
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)
