"""Estimate the parameters, FLOPs and memory of a network, with one class per architecture. This module does not import torch.

`network_cost` returns the estimates for a recipe. They are composed of the counts for one stack of transformer blocks in
`parameters`, `memory` and `accelerators`, at the lengths of the recipe's examples.

Legend: `C` width, `e` bytes per element in matrix products, `s` bytes per element in the residual stream.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Generic, TypeVar

from tinylm.cost import accelerators, cpu, memory, parameters
from tinylm.cost.accelerators import MatmulPrecision
from tinylm.cost.examples import ExampleSize
from tinylm.cost.memory import PassConfig
from tinylm.errors import InputError
from tinylm.recipe import Recipe
from tinylm.recipe.encoder import EncoderSection, MaskedLMObjective
from tinylm.recipe.encoder_decoder import EncoderDecoderSection
from tinylm.recipe.fixed_context import FeedForwardSection
from tinylm.recipe.labels import ClassificationObjective
from tinylm.recipe.pairs import TranslationObjective
from tinylm.recipe.recurrent import GruSection, LstmSection, RecurrentEncoderDecoderSection, RecurrentSection, RnnSection
from tinylm.recipe.schema import DataSection, DecoderSection, LoraSection, ModelVariant, TransformerSection
from tinylm.recipe.values import ComputeDtype

_MASKED_IN_EVALUATION = 0.15
"""The fraction of tokens that an evaluation of a masked language model masks."""
_PAIR_EVALUATION_TOKENS = 4096
"""Maximum number of tokens in an evaluation batch of sentence pairs."""
_CROSS_ATTENTION_SHARE = 0.5
"""Memory traffic of cross-attention, its norm and its residual connection, as a fraction of a block's. Assumed."""
_GATES = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 3}
_SAVED_BY_CELL = {"rnn_tanh": (2, 1), "rnn_relu": (2, 1), "gru": (6, 2), "lstm": (8, 8)}
"""Values that a recurrent layer saves at each position for each unit and for each input. Counted on a CPU, where an LSTM also saves
the workspace of oneDNN."""
_SAVED_IN_16_BIT = 0.65
"""Memory of these values in 16-bit precision, as a fraction of that in fp32. Fitted."""
_SAVED_BY_ATTENDING_CELL = {"gru": 13, "lstm": 15}
"""Values that a decoder with attention saves for each unit at each position, in its first layer and before the head. Counted."""
_STEP_KERNELS = {"rnn_tanh": 15, "rnn_relu": 15, "gru": 45, "lstm": 12, "attention": 90}
"""Kernels in the forward and backward pass for each position of a recurrent layer, and of additive attention with the layer that
uses it. Assumed."""

M = TypeVar("M", bound=ModelVariant)


class NetworkCost(ABC, Generic[M]):
    """The cost of a network. Unless stated otherwise, FLOPs, bytes and counts are per training example."""

    def __init__(self, model: M, recipe: Recipe, vocab_size: int, size: ExampleSize) -> None:
        self.model, self.recipe, self.vocab_size, self.size = model, recipe, vocab_size, size

    @property
    @abstractmethod
    def counts(self) -> Mapping[str, int]:
        """The number of parameters in each part of the network. See `parameters.parameter_counts`."""

    @property
    def parameter_count(self) -> int:
        return sum(self.counts.values())

    @property
    @abstractmethod
    def matrix_shapes(self) -> Counter[tuple[int, int]]:
        """The number of matrices that Muon updates, by shape (rows, columns)."""

    @abstractmethod
    def weight_flops(self, lora: LoraSection | None = None) -> float:
        """Return the FLOPs of products with weights in the forward and backward pass."""

    @property
    @abstractmethod
    def scores(self) -> float:
        """Number of attention scores in all layers and heads, including those that a causal mask hides."""

    @property
    @abstractmethod
    def attention_flops(self) -> float:
        """FLOPs of the products of queries with keys, and of probabilities with values, in the forward and backward pass."""

    def flops(self, lora: LoraSection | None = None) -> float:
        """Return the FLOPs of the forward and backward pass."""
        return self.weight_flops(lora) + self.attention_flops

    @abstractmethod
    def kernels(self, precision: ComputeDtype, *, compiled: bool) -> float:
        """Return the number of kernels in the forward and backward pass of a micro-batch."""

    @abstractmethod
    def elementwise_bytes(self, precision: ComputeDtype, *, compiled: bool, compiled_loss: bool = False) -> float:
        """Return the bytes moved outside matrix products. `compiled` applies only to the blocks."""

    @abstractmethod
    def matmul_bytes(self, precision: MatmulPrecision) -> float:
        """Return the bytes of activations that matrix products read and write."""

    @abstractmethod
    def activation_bytes(self, config: PassConfig) -> int:
        """Return the peak bytes in the forward and backward pass of a micro-batch with the longest examples.

        Weights, gradients and optimizer state are excluded.
        """

    @abstractmethod
    def evaluation_bytes(self) -> tuple[int, int]:
        """Return the peak bytes of an evaluation batch: in the layers, and while its logits exist."""

    @property
    @abstractmethod
    def depth(self) -> int:
        """The number of blocks or recurrent layers."""

    @property
    @abstractmethod
    def activation_width(self) -> int:
        """The width of the largest activation."""

    @property
    @abstractmethod
    def largest_table(self) -> int:
        """The number of parameters in the largest table whose gradient is one tensor."""

    @property
    def targets(self) -> float:
        """Mean number of positions at which the head runs."""
        return self.size.length


def _cross_entropy_bytes(rows: int, width: int, vocab_size: int, config: PassConfig, *, smoothed: bool = False) -> int:
    """Return the peak bytes of `F.cross_entropy` on all logits of `rows` rows, and of its backward pass.

    In the forward pass, the logits and their log-softmax exist together. In the backward pass, the gradients of the logits and
    of the head do. With label smoothing (`smoothed`), the log-softmax and two gradients exist together. In 16-bit precision, the
    logits and the head also exist in 16 bits.
    """
    logits, head = rows * vocab_size, vocab_size * width
    casts = 2 * (logits + head) if config.e < 4 else 0
    return max((12 if smoothed else 8) * logits, 4 * logits + 4 * head + 4 * rows * width) + casts


class TransformerCost(NetworkCost[TransformerSection]):
    """One stack of transformer blocks: a decoder or an encoder, with a head for all tokens, for masked tokens or for labels."""

    @property
    def _labels(self) -> ClassificationObjective | None:
        return self.recipe.objective if isinstance(self.recipe.objective, ClassificationObjective) else None

    @property
    def _has_transform(self) -> bool:
        return isinstance(self.model, EncoderSection) and self.model.head_transform and self._labels is None

    @property
    def _has_head_bias(self) -> bool:
        return isinstance(self.model, EncoderSection) and self.model.head_bias and self._labels is None

    @property
    def _rate(self) -> float:
        objective = self.recipe.objective
        return (objective.rate[0] + objective.rate[-1]) / 2 if isinstance(objective, MaskedLMObjective) else 1.0

    @property
    def targets(self) -> float:
        return self._rate * self.size.length if self._labels is None else 1.0

    @cached_property
    def counts(self) -> Mapping[str, int]:
        counts, model, width = dict(parameters.parameter_counts(self.model, self.vocab_size)), self.model, self.model.n_embd
        if isinstance(model, EncoderSection):
            norm = parameters.norm_parameters(model)
            counts["positions"] += model.token_types * width
            counts["rest"] -= 0 if model.norm_first_block else norm
            if self._has_transform:
                counts["matrices"] += width * width
                counts["rest"] += norm + (width if model.bias else 0)
            counts["head"] += self.vocab_size if self._has_head_bias else 0
        if self._labels is not None:
            labels = len(self._labels.labels)
            counts["head"] = (width + 1) * (labels + (width if self._labels.pooler != "none" else 0))
            if self._labels.pooler == "gelu_norm" and model.bias:  # without biases, the norm's gain is as large as the missing bias
                counts["head"] += 2 * width
        return counts

    @property
    def matrix_shapes(self) -> Counter[tuple[int, int]]:
        shapes = memory.matrix_shapes(self.model)
        if self._has_transform:
            shapes[self.model.n_embd, self.model.n_embd] += 1
        return shapes

    @property
    def _head_weights(self) -> int:
        """Number of weights in matrix products at each position with a target."""
        width = self.model.n_embd
        if self._labels is not None:
            return width * (len(self._labels.labels) + (width if self._labels.pooler != "none" else 0))
        return width * (self.vocab_size + (width if self._has_transform else 0))

    def weight_flops(self, lora: LoraSection | None = None) -> float:
        blocks = sum(rows * columns * count for (rows, columns), count in memory.matrix_shapes(self.model).items())
        head = self._head_weights * self.targets
        if lora is None:
            return 6.0 * (blocks * self.size.length + head)
        adapters = parameters.lora_parameters(self.model, lora)
        return (4.0 * blocks + 6.0 * adapters) * self.size.length + (4.0 if self._labels is None else 6.0) * head

    @property
    def scores(self) -> float:
        return self.model.n_layer * self.model.n_head * self.size.length**2

    @property
    def attention_flops(self) -> float:
        return (12 if self.model.bidirectional else 6) * self.scores * self.model.head_width

    def kernels(self, precision: ComputeDtype, *, compiled: bool) -> float:
        return cpu.kernels(self.model.n_layer, len(self.model.ngram_embeddings), precision, compiled=compiled)

    def elementwise_bytes(self, precision: ComputeDtype, *, compiled: bool, compiled_loss: bool = False) -> float:
        stream = 2 if precision == "bf16" else 4
        block = accelerators.block_bytes(self.model, precision, compiled=compiled, stream_bytes=stream)

        def outside(vocab_size: int) -> int:
            return accelerators.outside_block_bytes(
                self.model, vocab_size, precision, compiled=False, stream_bytes=stream, compiled_loss=compiled_loss
            )

        logits = 0 if self._labels is not None else self.targets * (outside(self.vocab_size) - outside(0))
        return self.size.length * (self.model.n_layer * block + outside(0)) + logits

    def matmul_bytes(self, precision: MatmulPrecision) -> float:
        per_token = [accelerators.matmul_bytes(self.model, vocab_size, precision) for vocab_size in (0, self.vocab_size)]
        head = 0 if self._labels is not None else self.targets * (per_token[1] - per_token[0])
        return self.size.length * per_token[0] + head

    def activation_bytes(self, config: PassConfig) -> int:
        model = self.model.model_copy(update={"context_length": self.size.longest})
        if not isinstance(self.recipe.objective, MaskedLMObjective) and self._labels is None:
            return memory.activation_bytes(model, config)
        config = replace(config, document_mask=config.document_mask or (self._labels is not None and model.bidirectional))
        width, tokens = model.n_embd, config.sequences * model.context_length
        gradient = tokens * width * config.s  # of the hidden states, which the blocks' backward pass needs
        backward = gradient + tokens * model.feed_forward_width * (2 if model.is_gated else 1) * config.e
        saved = memory.saved_bytes(model, config) - gradient - (0 if config.frozen else 4 * config.vocab_size * width)
        if self._labels is not None:
            return saved + backward
        rows = math.ceil(self._rate * tokens)
        selected = rows * (8 + 8 + width * config.s)
        if self._has_transform:
            selected += rows * (2 * width * config.e + memory.norm_bytes(model, config, config.s))
            selected += 2 * width * width if config.e < 4 else 0
        if self._has_head_bias:
            head = rows * width * config.e + _cross_entropy_bytes(rows, width, config.vocab_size, config)
        else:
            at_targets = model.model_copy(update={"context_length": rows})
            head = memory.loss_bytes(at_targets, replace(config, sequences=1)) + 4 * config.vocab_size * width
        return saved + max(selected + head, 4 * config.vocab_size * width + backward)

    def evaluation_bytes(self) -> tuple[int, int]:
        if self._labels is not None:
            return memory.evaluation_bytes(self.model, 1)
        if isinstance(self.recipe.objective, MaskedLMObjective):
            return memory.evaluation_bytes(self.model, max(1, round(_MASKED_IN_EVALUATION * self.vocab_size)))
        return memory.evaluation_bytes(self.model, self.vocab_size)

    @property
    def depth(self) -> int:
        return self.model.n_layer

    @property
    def activation_width(self) -> int:
        return self.model.feed_forward_width

    @property
    def largest_table(self) -> int:
        tables = len(self.model.ngram_embeddings) * self.model.ngram_rows * self.model.ngram_width
        return max(tables, self.vocab_size * self.model.n_embd)


class TranslatorCost(NetworkCost[M]):
    """A network that reads a source sentence and predicts a target sentence."""

    @property
    def source_vocab_size(self) -> int:
        objective = self.recipe.objective
        size = objective.source_vocab_size if isinstance(objective, TranslationObjective) else None
        return size or self.vocab_size

    @property
    @abstractmethod
    def _width(self) -> int:
        """C."""

    def _embeddings(self, tied: str) -> dict[str, int]:
        """Return the parameters of the embeddings and the head without its bias. `tied` is the value of `tie_embeddings`."""
        tables = 1 if tied == "all" else 2
        target = self.vocab_size * self._width
        source = self.source_vocab_size * self._width
        return {"embedding": source + (tables - 1) * target, "head": target if tied == "none" else 0}

    def _head_bytes(self, config: PassConfig) -> tuple[int, int]:
        """Return the bytes that the head's chunks of logits need at a time, and the bytes that the gradient of the head takes."""
        tokens = config.sequences * self.size.longest
        chunk = min(tokens, memory.loss_chunk_rows(config.vocab_size, on_gpu=config.on_gpu))
        gradient = 4 * config.vocab_size * self._width
        objective = self.recipe.objective
        smoothed = isinstance(objective, TranslationObjective) and objective.label_smoothing > 0
        return _cross_entropy_bytes(chunk, self._width, config.vocab_size, config, smoothed=smoothed), gradient

    @property
    def largest_table(self) -> int:
        return max(self.vocab_size, self.source_vocab_size) * self._width

    def _evaluated(self) -> tuple[int, int]:
        """Return the numbers of source and target positions in an evaluation batch."""
        pairs = max(1, _PAIR_EVALUATION_TOKENS // max(1, self.size.source_longest + self.size.longest))
        return pairs * self.size.source_longest, pairs * self.size.longest


class EncoderDecoderCost(TranslatorCost[EncoderDecoderSection]):
    """The encoder-decoder transformer."""

    @cached_property
    def _encoder(self) -> TransformerSection:
        return self.model.encoder

    @cached_property
    def _decoder(self) -> TransformerSection:
        return self.model.decoder

    @property
    def _width(self) -> int:
        return self.model.n_embd

    @property
    def _attention_shapes(self) -> Counter[tuple[int, int]]:
        """The matrices of cross-attention in all decoder blocks."""
        stack, layers = self._decoder, self.model.decoder_layers
        queries, keys = stack.n_head * stack.head_width, stack.kv_heads * stack.head_width
        return (
            Counter({(queries, stack.n_embd): layers})
            + Counter({(keys, stack.n_embd): 2 * layers})
            + Counter({(stack.n_embd, queries): layers})
        )

    @cached_property
    def counts(self) -> Mapping[str, int]:
        stack, layers = self._decoder, self.model.decoder_layers
        queries, keys = stack.n_head * stack.head_width, stack.kv_heads * stack.head_width
        stacks = [parameters.parameter_counts(each, self.vocab_size) for each in (self._encoder, stack)]
        small = (queries + 2 * keys + stack.n_embd if stack.bias else 0) + (2 * stack.head_width if stack.qk_norm else 0)
        small += parameters.norm_parameters(stack) * (2 if stack.norm_position == "both" else 1)
        cross = sum(rows * columns * count for (rows, columns), count in self._attention_shapes.items())
        embeddings = self._embeddings(self.model.tie_embeddings)
        return {
            **embeddings,
            "head": embeddings["head"] + (self.vocab_size if self.model.head_bias else 0),
            "positions": sum(each["positions"] for each in stacks),
            "tables": 0,
            "matrices": sum(each["matrices"] for each in stacks) + cross,
            "rest": sum(each["rest"] for each in stacks) + layers * small + (stack.n_embd if self.model.learned_start else 0),
        }

    @property
    def matrix_shapes(self) -> Counter[tuple[int, int]]:
        return memory.matrix_shapes(self._encoder) + memory.matrix_shapes(self._decoder) + self._attention_shapes

    def weight_flops(self, lora: LoraSection | None = None) -> float:
        def weights(shapes: Counter[tuple[int, int]]) -> int:
            return sum(rows * columns * count for (rows, columns), count in shapes.items())

        stack = self._decoder
        keys = 2 * stack.n_embd * stack.kv_heads * stack.head_width * self.model.decoder_layers
        at_source = weights(memory.matrix_shapes(self._encoder)) + keys
        at_target = weights(memory.matrix_shapes(stack)) + weights(self._attention_shapes) - keys + self.vocab_size * stack.n_embd
        return 6.0 * (at_source * self.size.source_length + at_target * self.size.length)

    @property
    def _layer_scores(self) -> tuple[float, float, float]:
        """Numbers of scores in all encoder blocks, in causal attention, and in cross-attention."""
        heads, source, target = self.model.n_head, self.size.source_length, self.size.length
        return (
            self.model.n_layer * heads * source**2,
            self.model.decoder_layers * heads * target**2,
            self.model.decoder_layers * heads * source * target,
        )

    @property
    def scores(self) -> float:
        return sum(self._layer_scores)

    @property
    def attention_flops(self) -> float:
        encoder, causal, cross = self._layer_scores
        return self._decoder.head_width * (12 * encoder + 6 * causal + 12 * cross)

    def kernels(self, precision: ComputeDtype, *, compiled: bool) -> float:
        blocks = self.model.n_layer + round((1 + _CROSS_ATTENTION_SHARE) * self.model.decoder_layers)
        return cpu.kernels(blocks, 0, precision, compiled=compiled)

    def elementwise_bytes(self, precision: ComputeDtype, *, compiled: bool, compiled_loss: bool = False) -> float:
        stream = 2 if precision == "bf16" else 4
        block = accelerators.block_bytes(self._decoder, precision, compiled=compiled, stream_bytes=stream)
        outside = [
            accelerators.outside_block_bytes(self._decoder, vocab_size, precision, compiled=False, stream_bytes=stream)
            for vocab_size in (0, self.vocab_size)
        ]
        source = self.size.source_length * (self.model.n_layer * block + outside[0])
        return source + self.size.length * ((1 + _CROSS_ATTENTION_SHARE) * self.model.decoder_layers * block + outside[1])

    def matmul_bytes(self, precision: MatmulPrecision) -> float:
        source = accelerators.matmul_bytes(self._encoder, 0, precision)
        target = accelerators.matmul_bytes(self._decoder, self.vocab_size, precision)
        head = accelerators.matmul_bytes(self._decoder.model_copy(update={"n_layer": 0}), self.vocab_size, precision)
        cross = _CROSS_ATTENTION_SHARE * (target - head)
        return self.size.source_length * source + self.size.length * (target + cross)

    def activation_bytes(self, config: PassConfig) -> int:
        sources, targets = config.sequences * self.size.source_longest, config.sequences * self.size.longest
        encoder = self._encoder.model_copy(update={"context_length": self.size.source_longest})
        decoder = self._decoder.model_copy(update={"context_length": self.size.longest})
        width, hidden = encoder.n_embd, encoder.feed_forward_width * (2 if encoder.is_gated else 1)
        masked = replace(config, document_mask=True)
        saved = self._stack_bytes(encoder, masked, sources) + self._stack_bytes(decoder, config, targets)
        saved += sources * width * config.s  # the input of cross-attention
        blocks = decoder.n_layer * self._cross_attention_bytes(config)
        block = 0
        if config.recompute:
            block = max(
                sources * memory.block_bytes(encoder, masked, 0),
                targets * memory.block_bytes(decoder, config, 0) + blocks // decoder.n_layer,
            )
        else:
            saved += blocks
        loss, head_gradient = self._head_bytes(config)
        backward = max(targets, sources) * (hidden + width) * config.e
        if targets > memory.loss_chunk_rows(config.vocab_size, on_gpu=config.on_gpu):
            loss += head_gradient  # the sum over the previous chunks
        return saved + max(loss, head_gradient + block + backward)

    def _stack_bytes(self, stack: TransformerSection, config: PassConfig, tokens: int) -> int:
        """Return the bytes that a stack's forward pass saves, without a head."""
        saved = memory.saved_bytes(stack, config)
        return saved - tokens * stack.n_embd * config.s - (0 if config.frozen else 4 * config.vocab_size * stack.n_embd)

    def _cross_attention_bytes(self, config: PassConfig) -> int:
        """Return the bytes that cross-attention and its norm save in a block for a micro-batch.

        The input of the keys and values is not counted. All blocks save the same tensor.
        """
        stack, e = self._decoder, config.e
        sources, targets = config.sequences * self.size.source_longest, config.sequences * self.size.longest
        queries, keys = stack.n_head * stack.head_width, stack.kv_heads * stack.head_width
        total = targets * (memory.norm_bytes(stack, config, config.s) + stack.n_embd * e)
        total += targets * 2 * queries * e + sources * 2 * keys * e  # queries, keys, values and the output
        if stack.qk_norm:
            total += e * (targets * queries + sources * keys)
        if stack.attention_dropout_p and not config.on_gpu:  # q, k, v and three score matrices per head, in float32
            total += 4 * (targets * queries + 2 * sources * queries + 3 * stack.n_head * targets * self.size.source_longest)
        else:
            total += 4 * stack.n_head * targets + sources * e
        return total + (targets * stack.n_embd if stack.dropout else 0)

    def evaluation_bytes(self) -> tuple[int, int]:
        """Blocks need about as many values as `memory.evaluation_bytes` counts for a decoder."""
        sources, targets = self._evaluated()
        stack = self._decoder.model_copy(update={"context_length": 1})
        per_token = memory.evaluation_bytes(stack, 1)[0] // min(memory.EVALUATION_BATCH_TOKENS, memory.EVALUATION_BATCH_LOGITS)
        blocks = per_token * max(sources, targets) + 4 * sources * self._width
        return blocks, 4 * targets * (self._width + 2 * self.vocab_size) + 4 * sources * self._width

    @property
    def depth(self) -> int:
        return self.model.n_layer + self.model.decoder_layers

    @property
    def activation_width(self) -> int:
        return self._decoder.feed_forward_width


class RecurrentTranslatorCost(TranslatorCost[RecurrentEncoderDecoderSection]):
    """The recurrent encoder-decoder, with or without attention. The step time is a rough estimate."""

    @property
    def _width(self) -> int:
        return self.model.n_embd

    @property
    def _directions(self) -> int:
        return 2 if self.model.encoder_direction == "both" else 1

    @property
    def _attends(self) -> bool:
        return self.model.attention == "additive"

    @property
    def _encoder_inputs(self) -> list[int]:
        """The widths of the inputs of the encoder's layers, in one direction."""
        return [self._width] + [self.model.memory_width] * (self.model.n_layer - 1)

    @property
    def _decoder_inputs(self) -> list[int]:
        first = self._width + (self.model.memory_width if self._attends else 0)
        return [first] + [self._width] * (self.model.n_layer - 1)

    @cached_property
    def _linear_shapes(self) -> dict[str, tuple[int, int]]:
        """The matrices outside the layers, by the positions at which they are used."""
        width, state = self._width, self._width * (2 if self.model.cell == "lstm" else 1)
        shapes = {}
        if self._directions == 2:
            shapes["bridge"] = (state, 2 * state)
        if self._attends:
            shapes["query"], shapes["key"] = (width, width), (width, self.model.memory_width)
            shapes["readout"] = (2 * width, 2 * width + self.model.memory_width)
        return shapes

    @property
    def matrix_shapes(self) -> Counter[tuple[int, int]]:
        width, gates = self._width, _GATES[self.model.cell]
        shapes: Counter[tuple[int, int]] = Counter()
        for inputs, copies in ((self._encoder_inputs, self._directions), (self._decoder_inputs, 1)):
            for columns in inputs:
                shapes[width, columns] += gates * copies
                shapes[width, width] += gates * copies
        for name, shape in self._linear_shapes.items():
            shapes[shape] += self.model.n_layer if name == "bridge" else 1
        return shapes

    @cached_property
    def counts(self) -> Mapping[str, int]:
        width, layers = self._width, self.model.n_layer
        biases = 2 * _GATES[self.model.cell] * width * layers * (self._directions + 1)
        biases += sum(
            shape[0] * (layers if name == "bridge" else 1) for name, shape in self._linear_shapes.items() if name != "query"
        )
        return {
            **self._embeddings(self.model.tie_embeddings),
            "positions": 0,
            "tables": 0,
            "matrices": sum(rows * columns * count for (rows, columns), count in self.matrix_shapes.items()),
            "rest": biases + (width if self._attends else 0),
        }

    def weight_flops(self, lora: LoraSection | None = None) -> float:
        width, gates = self._width, _GATES[self.model.cell]
        linear = {name: rows * columns for name, (rows, columns) in self._linear_shapes.items()}
        source = gates * width * self._directions * sum(inputs + width for inputs in self._encoder_inputs) + linear.get("key", 0)
        target = gates * width * sum(inputs + width for inputs in self._decoder_inputs)
        target += linear.get("query", 0) + linear.get("readout", 0) + self.vocab_size * width
        bridges = linear.get("bridge", 0) * self.model.n_layer
        return 6.0 * (source * self.size.source_length + target * self.size.length + bridges)

    @property
    def scores(self) -> float:
        return 0.0

    @property
    def attention_flops(self) -> float:
        """The weighted means of the encoder's outputs. The scores are not matrix products."""
        return 6.0 * self.size.source_length * self.size.length * self.model.memory_width if self._attends else 0.0

    def kernels(self, precision: ComputeDtype, *, compiled: bool) -> float:
        cell, layers = _STEP_KERNELS[self.model.cell], self.model.n_layer
        target_layers = layers - 1 if self._attends else layers
        attention = self.size.length * (_STEP_KERNELS["attention"] if self._attends else 0)
        steps = self.size.source_length * layers * self._directions + self.size.length * target_layers
        return cpu.OUTSIDE_KERNELS + cell * steps + attention

    def elementwise_bytes(self, precision: ComputeDtype, *, compiled: bool, compiled_loss: bool = False) -> float:
        """Each value that is saved is written once and read once, and its gradient too."""
        values = self._saved_values(self.size.source_length, self.size.length)
        return 4 * 4 * values + self.size.length * self.vocab_size * (8 + 4 + 12)

    def matmul_bytes(self, precision: MatmulPrecision) -> float:
        return 4 * 3 * self._saved_values(self.size.source_length, self.size.length)

    def _saved_values(self, sources: float, targets: float, precision: ComputeDtype = "fp32") -> float:
        """Return the number of float32 values that take as much memory as what the forward pass of one pair saves."""
        share = 1.0 if precision == "fp32" else _SAVED_IN_16_BIT
        width, memory_width, cell = self._width, self.model.memory_width, self.model.cell
        per_unit, per_input = _SAVED_BY_CELL[cell]
        encoder = self._directions * (width + sum(per_unit * width + per_input * inputs for inputs in self._encoder_inputs))
        if not self._attends:
            decoder = width + sum(per_unit * width + per_input * inputs for inputs in self._decoder_inputs)
            return share * (sources * encoder + targets * decoder)
        first = _SAVED_BY_ATTENDING_CELL[cell] * width + 2 * memory_width
        others = share * sum(per_unit * width + per_input * inputs for inputs in self._decoder_inputs[1:])
        return sources * (share * encoder + memory_width) + targets * (first + others) + sources * targets * width

    def activation_bytes(self, config: PassConfig) -> int:
        sources, targets = self.size.source_longest, self.size.longest
        tokens = config.sequences * (sources + targets)
        saved = config.sequences * round(4 * self._saved_values(sources, targets, config.precision)) + 8 * tokens
        loss, head_gradient = self._head_bytes(config)
        if config.sequences * targets > memory.loss_chunk_rows(config.vocab_size, on_gpu=config.on_gpu):
            loss += head_gradient  # the sum over the previous chunks
        backward = 4 * config.sequences * max(sources, targets) * _GATES[self.model.cell] * self._width
        return saved + max(loss, head_gradient + backward)

    def evaluation_bytes(self) -> tuple[int, int]:
        sources, targets = self._evaluated()
        layers = 4 * max(sources, targets) * (_GATES[self.model.cell] + 3) * self.model.memory_width
        return layers, 4 * targets * (self._width + 2 * self.vocab_size) + 4 * sources * 2 * self.model.memory_width

    @property
    def depth(self) -> int:
        return self.model.n_layer * (self._directions + 1)

    @property
    def activation_width(self) -> int:
        return _GATES[self.model.cell] * self._width


class StatefulCost(NetworkCost[M]):
    """A language model without attention. All positions of an example have logits."""

    @property
    @abstractmethod
    def _head_inputs(self) -> int:
        """The width of the head's inputs."""

    @property
    @abstractmethod
    def _saved_values(self) -> float:
        """Values that the forward pass of one example saves outside the loss."""

    @property
    def scores(self) -> float:
        return 0.0

    @property
    def attention_flops(self) -> float:
        return 0.0

    def elementwise_bytes(self, precision: ComputeDtype, *, compiled: bool, compiled_loss: bool = False) -> float:
        """Each value that is saved is written once and read once, and its gradient too. The loss is as in a decoder."""
        logits = 4 * (2 if precision != "fp32" else 4) if compiled_loss else 8 + 4 + 12
        return 4 * 4 * self._saved_values + self.size.length * self.vocab_size * logits

    def matmul_bytes(self, precision: MatmulPrecision) -> float:
        return 4 * 3 * self._saved_values

    def activation_bytes(self, config: PassConfig) -> int:
        tokens = config.sequences * self.size.longest
        saved = config.sequences * round(4 * self._saved_values) + 8 * tokens
        sizes = {"n_layer": 1, "n_head": 1, "n_embd": self._head_inputs, "context_length": self.size.longest}
        head = DecoderSection.model_validate({"preset": "gpt2", **sizes})
        backward = 4 * tokens * self.activation_width
        return saved + max(memory.loss_bytes(head, config) + 4 * self.vocab_size * self._head_inputs, backward)

    def evaluation_bytes(self) -> tuple[int, int]:
        rows = min(memory.EVALUATION_BATCH_TOKENS, max(1, memory.EVALUATION_BATCH_LOGITS // self.vocab_size))
        return 4 * rows * self.activation_width, 4 * rows * (self._head_inputs + 2 * self.vocab_size)

    @property
    def largest_table(self) -> int:
        return self.vocab_size * self._head_inputs


class RecurrentCost(StatefulCost[RecurrentSection]):
    """A recurrent language model. The step time is a rough estimate."""

    @property
    def _head_inputs(self) -> int:
        return self.model.n_embd

    @property
    def matrix_shapes(self) -> Counter[tuple[int, int]]:
        width = self.model.n_embd
        return Counter({(width, width): 2 * _GATES[self.model.cell] * self.model.n_layer})

    @property
    def counts(self) -> Mapping[str, int]:
        width, rows = self.model.n_embd, _GATES[self.model.cell] * self.model.n_embd * self.model.n_layer
        table = self.vocab_size * width
        return {
            "embedding": table,
            "positions": 0,
            "tables": 0,
            "head": 0 if self.model.tie_embeddings else table,
            "matrices": 2 * rows * width,
            "rest": 2 * rows,
        }

    @property
    def _trained_positions(self) -> float:
        """Number of positions whose gradients are computed. The others are only read to compute the first state."""
        return self.size.length - self.model.burn_in

    def weight_flops(self, lora: LoraSection | None = None) -> float:
        layers, head = self.counts["matrices"], self.vocab_size * self.model.n_embd
        return 6.0 * layers * self._trained_positions + 2.0 * layers * self.model.burn_in + 6.0 * head * self.size.length

    def kernels(self, precision: ComputeDtype, *, compiled: bool) -> float:
        return cpu.OUTSIDE_KERNELS + _STEP_KERNELS[self.model.cell] * self.model.n_layer * self.size.length

    @property
    def _saved_values(self) -> float:
        per_unit, per_input = _SAVED_BY_CELL[self.model.cell]
        layers = self.model.n_layer * (per_unit + per_input) * self.model.n_embd
        return self._trained_positions * (self.model.n_embd + layers) + self.size.length * self.model.n_embd

    @property
    def depth(self) -> int:
        return self.model.n_layer

    @property
    def activation_width(self) -> int:
        return _GATES[self.model.cell] * self.model.n_embd


class FeedForwardCost(StatefulCost[FeedForwardSection]):
    """A feed-forward network that reads a fixed number of tokens."""

    @property
    def _inputs(self) -> int:
        """The width of the inputs of the hidden layer."""
        widths = {"embedding": self.model.n_embd, "one_hot": self.vocab_size + 1, "number": 1}
        return self.model.window * widths[self.model.input]

    @property
    def _head_inputs(self) -> int:
        return self.model.n_hidden + (self._inputs if self.model.direct else 0) + 1  # the bias is a column of the head

    @property
    def matrix_shapes(self) -> Counter[tuple[int, int]]:
        return Counter({(self.model.n_hidden, self._inputs): 1})

    @property
    def counts(self) -> Mapping[str, int]:
        return {
            "embedding": (self.vocab_size + 1) * self.model.n_embd if self.model.input == "embedding" else 0,
            "positions": 0,
            "tables": 0,
            "head": self.vocab_size * self._head_inputs,
            "matrices": self.model.n_hidden * self._inputs,
            "rest": self.model.n_hidden,
        }

    def weight_flops(self, lora: LoraSection | None = None) -> float:
        """With one-hot inputs, the hidden layer adds up columns of its weight instead of multiplying by it."""
        hidden = 0 if self.model.input == "one_hot" else self.counts["matrices"]
        return 6.0 * self.size.length * (hidden + self.counts["head"])

    def kernels(self, precision: ComputeDtype, *, compiled: bool) -> float:
        return cpu.kernels(1, 0, precision, compiled=False)

    @property
    def _saved_values(self) -> float:
        inputs = self.model.n_hidden if self.model.input == "one_hot" else self._inputs
        copies = 2 if self.model.direct else 1
        return self.size.length * (copies * inputs + self.model.n_hidden + 2 * self._head_inputs + 2 * self.model.window)

    @property
    def depth(self) -> int:
        return 1

    @property
    def activation_width(self) -> int:
        return max(self.model.n_hidden, self._head_inputs)


_COSTS: Mapping[type[ModelVariant], type[NetworkCost]] = {  # type: ignore[type-arg]
    DecoderSection: TransformerCost,
    EncoderSection: TransformerCost,
    EncoderDecoderSection: EncoderDecoderCost,
    RecurrentEncoderDecoderSection: RecurrentTranslatorCost,
    RnnSection: RecurrentCost,
    LstmSection: RecurrentCost,
    GruSection: RecurrentCost,
    FeedForwardSection: FeedForwardCost,
}


def network_cost(recipe: Recipe, vocab_size: int, size: ExampleSize | None = None) -> NetworkCost:  # type: ignore[type-arg]
    """Return the estimates for a recipe's network. `size` is the size of its examples, or None for the largest possible size.

    Raises `InputError` if the architecture has no estimates.
    """
    cost = next((cost for section, cost in _COSTS.items() if isinstance(recipe.model, section)), None)
    if cost is None:
        name = recipe.model.architecture
        raise InputError(f"the cost of the {name} architecture cannot be estimated", where="model.architecture")
    return cost(recipe.model, recipe, vocab_size, size or ExampleSize.largest(recipe))


def has_document_mask(recipe: Recipe) -> bool:
    """Return whether each training sequence of a text has its own attention mask."""
    return isinstance(recipe.data, DataSection) and recipe.data.document_mask
