"""Import and export encoders (BERT, DistilBERT, RoBERTa, ModernBERT) as masked language models, classifiers or bare models.

tinylm's encoder can be configured to match each of them, so only tensor names and layouts differ. In tinylm, queries, keys and
values share one matrix. RoBERTa numbers positions from `pad_token_id + 1`, so the rows before that are dropped. Exports use BERT's
format.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from tinylm.errors import InputError
from tinylm.interchange import config_types
from tinylm.model.base import BODY, Model
from tinylm.model.classifier import SequenceClassifier
from tinylm.recipe.encoder import EncoderSection, MaskedLMObjective
from tinylm.recipe.labels import ClassificationObjective
from tinylm.recipe.schema import ObjectiveVariant
from tinylm.recipe.support import ANY, SIZES, TRAINING, Supports, check_supported
from tinylm.recipe.values import show

KINDS = ("bert", "distilbert", "roberta", "modernbert")
"""Values of `model_type` that can be imported as encoders."""
_ACTIVATIONS = {"gelu": "gelu_exact", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "relu": "relu"}
_TO_ACTIVATION = {"gelu_exact": "gelu", "gelu": "gelu_new", "relu": "relu"}
BERT: Supports = {
    **SIZES,
    **TRAINING,
    "architecture": ("encoder",),
    "norm": ("layernorm",),
    "norm_position": ("post",),
    "norm_gain": (True,),
    "position": ("learned",),
    "feed_forward": tuple(_TO_ACTIVATION),
    "bias": (True,),
    "tie_embeddings": (True,),
    "qk_norm": (False,),
    "embedding_norm": (True,),
    "token_types": ANY,
    "head_transform": ANY,
    "head_bias": ANY,
}
"""The values of the `model:` keys that BertModel supports."""


@dataclass(frozen=True)
class ImportedEncoder:
    """The contents of a folder: the recipe sections and the weights under tinylm's names. `has_head` is False for a bare model."""

    model: EncoderSection
    objective: ObjectiveVariant
    state: dict[str, Tensor]
    has_head: bool


# Import.


def read(config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> ImportedEncoder:
    """Convert config.json and tensors. Raises `InputError` if the model is unsupported, or if tensors are missing or unexpected."""
    model = section_from_config(config, f"{where}/config.json")
    kind, task = str(config["model_type"]), _task(config)
    objective = _classification(config, tensors, kind, where) if task == "classification" else MaskedLMObjective()
    has_head = task != "none"
    if task != "masked_lm":
        model = model.model_copy(update={"head_transform": False, "head_bias": False, "tie_embeddings": True})
    remaining = {_short_name(name, kind): tensor.float() for name, tensor in tensors.items() if not name.endswith(_BUFFERS)}
    missing: list[str] = []

    def pop(name: str) -> Tensor:
        if name not in remaining:
            missing.append(name)
        return remaining.pop(name, torch.zeros(0))

    state = dict(_CONVERTERS[kind](pop, model))
    if kind == "roberta":  # the rows before the first position are for padding
        state["positions.weight"] = state["positions.weight"][int(config.get("pad_token_id") or 0) + 1 :]
    if isinstance(objective, ClassificationObjective):
        state = {BODY + name: tensor for name, tensor in state.items()}
        if kind == "modernbert":
            state["pooler_norm.weight"] = pop("head.norm.weight")
        else:
            state["pooler.bias"] = pop(f"{_POOLERS[kind]}.bias")
        state["pooler.weight"] = pop(f"{_POOLERS[kind]}.weight")
        for part in ("weight", "bias"):
            state[f"output.{part}"] = pop(f"{_OUTPUTS[kind]}.{part}")
    unexpected = sorted(name for name in remaining if not name.startswith(_UNUSED))
    if missing or unexpected:
        parts = [f"missing tensors: {_short(missing)}"] if missing else []
        parts += [f"unexpected tensors: {_short(unexpected)}"] if unexpected else []
        raise InputError("; ".join(parts), where=where)
    return ImportedEncoder(model, objective, state, has_head)


_BUFFERS = ("position_ids", "token_type_ids")
_UNUSED = (
    "pooler.",
    "cls.seq_relationship.",
    "cls.predictions.",
    "lm_head.",
    "vocab_",
    "decoder.",
    "head.",
    "classifier.",
    "pre_classifier.",
)
"""Name prefixes of tensors that are not loaded because they belong to other heads or are tied weights."""
_POOLERS = {"bert": "pooler.dense", "roberta": "classifier.dense", "distilbert": "pre_classifier", "modernbert": "head.dense"}
_OUTPUTS = {"bert": "classifier", "roberta": "classifier.out_proj", "distilbert": "classifier", "modernbert": "classifier"}
_ACTIVATIONS_OF_POOLERS = {"bert": "tanh", "roberta": "tanh", "distilbert": "relu", "modernbert": "gelu_norm"}
_PREFIXES = {"bert": "bert.", "roberta": "roberta.", "distilbert": "distilbert.", "modernbert": "model."}


def _short_name(name: str, kind: str) -> str:
    """Return a tensor's name without the body's prefix, and with `weight` and `bias` for TensorFlow's `gamma` and `beta`."""
    return (
        name.removeprefix(_PREFIXES[kind])
        .replace("LayerNorm.gamma", "LayerNorm.weight")
        .replace("LayerNorm.beta", "LayerNorm.bias")
    )


def _short(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _task(config: Mapping[str, Any]) -> str:
    """Return the task of the saved class: `masked_lm`, `classification` or `none`."""
    architecture = str((config.get("architectures") or [""])[0])
    if architecture.endswith("ForSequenceClassification"):
        return "classification"
    return "masked_lm" if architecture.endswith(("ForMaskedLM", "ForPreTraining")) else "none"


def _classification(config: Mapping[str, Any], tensors: Mapping[str, Tensor], kind: str, where: str) -> ClassificationObjective:
    """Return the objective with the labels in `id2label`, which config.json omits if the labels are LABEL_0 and LABEL_1."""
    where = f"{where}/config.json"
    if config.get("problem_type") not in (None, "single_label_classification"):
        raise InputError(f"problem_type {config['problem_type']!r} is not supported, only one label per text", where=where)
    output = tensors.get(f"{_OUTPUTS[kind]}.weight")
    names: Any = config.get("id2label")
    if names is None and output is not None:
        names = {str(row): f"LABEL_{row}" for row in range(len(output))}
    try:
        labels = tuple(str(names[id]) for id in sorted(names, key=int))
    except (TypeError, ValueError):
        raise InputError("id2label must be an object whose keys are the label ids", where=where) from None
    if len(labels) < 2:
        raise InputError("the model has fewer than 2 labels, so it is not a classifier (perhaps a regression model)", where=where)
    repeated = [label for label, count in Counter(labels).items() if count > 1]
    if repeated:
        hint = "give each label its own name"
        raise InputError(f"id2label has the label {show(repeated[0])} more than once", where=where, hint=hint)
    pool = config.get("classifier_pooling", "cls") if kind == "modernbert" else "cls"
    try:
        return ClassificationObjective(pool=pool, pooler=_ACTIVATIONS_OF_POOLERS[kind], labels=labels)  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InputError(f"unsupported classifier: {first['loc'][0]}: {first['msg']}", where=where) from None


_REQUIRED: dict[str, Any] = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "quantization_config": None,
    "sinusoidal_pos_embds": False,
}
"""Keys in config.json that affect the computation, with the only supported value of each."""


def section_from_config(config: Mapping[str, Any], where: str) -> EncoderSection:
    """Return the `model:` section that config.json describes. Raises `InputError` if the model is not supported."""
    kind = config.get("model_type")
    if kind not in KINDS:
        raise InputError(f"unsupported model_type {show(kind)} (supported: {', '.join(KINDS)})", where=where)
    config_types.check_types(config, where)
    for key, value in _REQUIRED.items():
        if config.get(key, value) not in (value, None):
            raise InputError(f"{key} {config[key]!r} is not supported", where=where)
    try:
        values = {"bert": _bert_values, "roberta": _bert_values, "distilbert": _distilbert_values, "modernbert": _modernbert_values}
        model = EncoderSection.model_validate({"architecture": "encoder", **values[kind](config, where)})
    except KeyError as error:
        raise InputError(f"missing key {error}", where=where) from None
    except ValueError as error:
        raise InputError(f"invalid model configuration: {' '.join(str(error).split())}", where=where) from None
    for key, problem in model.problems():
        raise InputError(f"invalid model configuration: {key} {problem}", where=where)
    return model


def _activation(name: object, where: str) -> str:
    if name not in _ACTIVATIONS:
        raise InputError(f"activation {show(name)} is not supported", where=where)
    return _ACTIVATIONS[str(name)]


def _bert_values(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    is_roberta = config["model_type"] == "roberta"
    skipped = int(config.get("pad_token_id") or 0) + 1 if is_roberta else 0
    return {
        "preset": "bert",
        "n_layer": config["num_hidden_layers"],
        "n_head": config["num_attention_heads"],
        "n_embd": config["hidden_size"],
        "n_inner": config["intermediate_size"],
        "context_length": config["max_position_embeddings"] - skipped,
        "feed_forward": _activation(config.get("hidden_act", "gelu"), where),
        "norm_eps": config.get("layer_norm_eps", 1e-12),
        "token_types": config.get("type_vocab_size", 2),
        "dropout": float(config.get("hidden_dropout_prob", 0.1)),
    }


def _distilbert_values(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    return {
        "preset": "bert",
        "n_layer": config["n_layers"],
        "n_head": config["n_heads"],
        "n_embd": config["dim"],
        "n_inner": config["hidden_dim"],
        "context_length": config["max_position_embeddings"],
        "feed_forward": _activation(config.get("activation", "gelu"), where),
        "token_types": 0,
        "dropout": float(config.get("dropout", 0.1)),
    }


def _modernbert_values(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    every = int(config.get("global_attn_every_n_layers") or 3)
    if config.get("hidden_activation", "gelu") != "gelu" or config.get("classifier_activation", "gelu") != "gelu":
        raise InputError("only the activation gelu is supported", where=where)
    if any(config.get(key, False) for key in ("attention_bias", "mlp_bias", "norm_bias", "classifier_bias")):
        raise InputError("biases in blocks, norms and the head's linear layer are not supported", where=where)
    rope = config.get("rope_parameters") or {}
    window, context = config.get("local_attention", 128), config["max_position_embeddings"]
    return {
        "preset": "bert",
        "n_layer": config["num_hidden_layers"],
        "n_head": config["num_attention_heads"],
        "n_embd": config["hidden_size"],
        "n_inner": config["intermediate_size"],
        "context_length": context,
        "norm_position": "pre",
        "norm_eps": config.get("norm_eps", 1e-5),
        "position": "rope",
        "rope_theta": float((rope.get("full_attention") or {}).get("rope_theta") or config.get("global_rope_theta") or 160000.0),
        "rope_theta_local": float(
            (rope.get("sliding_attention") or {}).get("rope_theta") or config.get("local_rope_theta") or 10000.0
        ),
        "attention_window": window // 2 + 1,
        "attention_pattern": ["global", *["local"] * (every - 1)],
        "feed_forward": "geglu_exact",
        "bias": False,
        "norm_first_block": False,
        "head_bias": bool(config.get("decoder_bias", True)),
        "tie_embeddings": bool(config.get("tie_word_embeddings", True)),
        "token_types": 0,
    }


Pop = Callable[[str], Tensor]
_Names = Mapping[str, str]


def _both(pop: Pop, ours: str, theirs: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the weight and bias of a module."""
    for part in ("weight", "bias"):
        yield f"{ours}.{part}", pop(f"{theirs}.{part}")


def _fused(pop: Pop, ours: str, names: tuple[str, str, str]) -> Iterator[tuple[str, Tensor]]:
    """Yield the weight and bias of the queries, keys and values, each joined into one tensor."""
    for part in ("weight", "bias"):
        yield f"{ours}.{part}", torch.cat([pop(f"{name}.{part}") for name in names])


_BERT_BLOCK: _Names = {
    "attention.output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "feed_forward.input": "intermediate.dense",
    "feed_forward.output": "output.dense",
    "feed_forward_norm": "output.LayerNorm",
}
_BERT_QKV = ("query", "key", "value")


def _from_bert(pop: Pop, model: EncoderSection) -> Iterator[tuple[str, Tensor]]:
    yield "embedding.weight", pop("embeddings.word_embeddings.weight")
    yield "positions.weight", pop("embeddings.position_embeddings.weight")
    if model.token_types:
        yield "token_types.weight", pop("embeddings.token_type_embeddings.weight")
    yield from _both(pop, "embedding_norm", "embeddings.LayerNorm")
    for layer in range(model.n_layer):
        block = f"encoder.layer.{layer}"
        q, k, v = (f"{block}.attention.self.{name}" for name in _BERT_QKV)
        yield from _fused(pop, f"blocks.{layer}.attention.qkv", (q, k, v))
        for ours, theirs in _BERT_BLOCK.items():
            yield from _both(pop, f"blocks.{layer}.{ours}", f"{block}.{theirs}")


def _from_bert_with_head(pop: Pop, model: EncoderSection) -> Iterator[tuple[str, Tensor]]:
    yield from _from_bert(pop, model)
    if model.head_transform:
        yield from _both(pop, "head_transform.dense", "cls.predictions.transform.dense")
        yield from _both(pop, "head_transform.norm", "cls.predictions.transform.LayerNorm")
        yield "head.bias", pop("cls.predictions.bias")


def _from_roberta(pop: Pop, model: EncoderSection) -> Iterator[tuple[str, Tensor]]:
    yield from _from_bert(pop, model)
    if model.head_transform:
        yield from _both(pop, "head_transform.dense", "lm_head.dense")
        yield from _both(pop, "head_transform.norm", "lm_head.layer_norm")
        yield "head.bias", pop("lm_head.bias")


_DISTILBERT_BLOCK: _Names = {
    "attention.output": "attention.out_lin",
    "attention_norm": "sa_layer_norm",
    "feed_forward.input": "ffn.lin1",
    "feed_forward.output": "ffn.lin2",
    "feed_forward_norm": "output_layer_norm",
}


def _from_distilbert(pop: Pop, model: EncoderSection) -> Iterator[tuple[str, Tensor]]:
    yield "embedding.weight", pop("embeddings.word_embeddings.weight")
    yield "positions.weight", pop("embeddings.position_embeddings.weight")
    yield from _both(pop, "embedding_norm", "embeddings.LayerNorm")
    for layer in range(model.n_layer):
        block = f"transformer.layer.{layer}"
        q, k, v = (f"{block}.attention.{name}_lin" for name in "qkv")
        yield from _fused(pop, f"blocks.{layer}.attention.qkv", (q, k, v))
        for ours, theirs in _DISTILBERT_BLOCK.items():
            yield from _both(pop, f"blocks.{layer}.{ours}", f"{block}.{theirs}")
    if model.head_transform:
        yield from _both(pop, "head_transform.dense", "vocab_transform")
        yield from _both(pop, "head_transform.norm", "vocab_layer_norm")
        yield "head.bias", pop("vocab_projector.bias")


def _from_modernbert(pop: Pop, model: EncoderSection) -> Iterator[tuple[str, Tensor]]:
    yield "embedding.weight", pop("embeddings.tok_embeddings.weight")
    yield "embedding_norm.weight", pop("embeddings.norm.weight")
    for layer in range(model.n_layer):
        ours, theirs = f"blocks.{layer}", f"layers.{layer}"
        if layer:
            yield f"{ours}.attention_norm.weight", pop(f"{theirs}.attn_norm.weight")
        yield f"{ours}.attention.qkv.weight", pop(f"{theirs}.attn.Wqkv.weight")
        yield f"{ours}.attention.output.weight", pop(f"{theirs}.attn.Wo.weight")
        yield f"{ours}.feed_forward_norm.weight", pop(f"{theirs}.mlp_norm.weight")
        yield f"{ours}.feed_forward.input.weight", pop(f"{theirs}.mlp.Wi.weight")
        yield f"{ours}.feed_forward.output.weight", pop(f"{theirs}.mlp.Wo.weight")
    yield "final_norm.weight", pop("final_norm.weight")
    if model.head_transform:
        yield "head_transform.dense.weight", pop("head.dense.weight")
        yield "head_transform.norm.weight", pop("head.norm.weight")
    if model.head_bias:
        yield "head.bias", pop("decoder.bias")
    if not model.tie_embeddings:
        yield "head.weight", pop("decoder.weight")


_CONVERTERS: dict[str, Callable[[Pop, EncoderSection], Iterator[tuple[str, Tensor]]]] = {
    "bert": _from_bert_with_head,
    "roberta": _from_roberta,
    "distilbert": _from_distilbert,
    "modernbert": _from_modernbert,
}


# Export.


def check_exportable(model: EncoderSection, objective: ObjectiveVariant, has_head: bool) -> str:
    """Return the name of the transformers class that loads a model. Raises `InputError` if there is none."""
    check_supported(model, BERT, "export to Hugging Face", "--to hf")
    if isinstance(objective, ClassificationObjective):
        if objective.pool not in ("auto", "cls") or objective.pooler != "tanh":
            raise InputError("BertForSequenceClassification needs objective.pool cls and objective.pooler tanh", where="--to hf")
        return "BertForSequenceClassification"
    if not has_head:
        return "BertModel"
    if not (model.head_transform and model.head_bias):
        raise InputError("BertForMaskedLM needs model.head_transform and model.head_bias", where="--to hf")
    return "BertForMaskedLM"


def make_config(network: Model, objective: ObjectiveVariant, has_head: bool) -> dict[str, Any]:
    """Return the contents of config.json in BERT's format, without the special token ids."""
    model = network.model
    assert isinstance(model, EncoderSection)
    config = {
        "architectures": [check_exportable(model, objective, has_head)],
        "model_type": "bert",
        "vocab_size": network.vocab_size,
        "hidden_size": model.n_embd,
        "num_hidden_layers": model.n_layer,
        "num_attention_heads": model.n_head,
        "intermediate_size": model.feed_forward_width,
        "hidden_act": _TO_ACTIVATION[model.feed_forward],
        "hidden_dropout_prob": model.dropout,
        "attention_probs_dropout_prob": model.attention_dropout_p,
        "max_position_embeddings": model.context_length,
        "type_vocab_size": max(1, model.token_types),
        "layer_norm_eps": model.norm_eps,
        "initializer_range": 0.02,
        "position_embedding_type": "absolute",
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }
    if isinstance(objective, ClassificationObjective):
        config["id2label"] = {str(id): label for id, label in enumerate(objective.labels)}
        config["label2id"] = {label: id for id, label in enumerate(objective.labels)}
        config["problem_type"] = "single_label_classification"
    return config


def export_tensors(network: Model, has_head: bool) -> dict[str, Tensor]:
    """Return the weights of an encoder or classifier with BERT's names and layouts.

    The names in the body start with `bert.` if the model has a head, as in the classes of transformers.
    """
    state = network.state_dict()
    body, prefix = state, _PREFIXES["bert"] if has_head else ""
    outputs: dict[str, str] = {}
    if isinstance(network, SequenceClassifier):
        outputs = {"pooler": "bert.pooler.dense", "output": "classifier"}
        body = {name.removeprefix(BODY): tensor for name, tensor in state.items() if name.startswith(BODY)}
    elif has_head:
        outputs = {
            "head_transform.dense": "cls.predictions.transform.dense",
            "head_transform.norm": "cls.predictions.transform.LayerNorm",
        }
    tensors = {prefix + name: tensor for name, tensor in _to_bert(body, network.model)}
    for ours, theirs in outputs.items():
        for part in ("weight", "bias"):
            tensors[f"{theirs}.{part}"] = state[f"{ours}.{part}"]
    if "head.bias" in state:
        tensors["cls.predictions.bias"] = state["head.bias"]
    return {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}


def _to_bert(state: Mapping[str, Tensor], model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of BertModel, except those of its pooler."""
    yield "embeddings.word_embeddings.weight", state["embedding.weight"]
    yield "embeddings.position_embeddings.weight", state["positions.weight"]
    types = state.get("token_types.weight")
    yield "embeddings.token_type_embeddings.weight", torch.zeros(1, model.n_embd) if types is None else types
    for part in ("weight", "bias"):
        yield f"embeddings.LayerNorm.{part}", state[f"embedding_norm.{part}"]
        for layer in range(model.n_layer):
            ours, theirs = f"blocks.{layer}", f"encoder.layer.{layer}"
            for name, tensor in zip(_BERT_QKV, state[f"{ours}.attention.qkv.{part}"].chunk(3), strict=True):
                yield f"{theirs}.attention.self.{name}.{part}", tensor
            for block_name, bert_name in _BERT_BLOCK.items():
                yield f"{theirs}.{bert_name}.{part}", state[f"{ours}.{block_name}.{part}"]
