"""Read, write and check folders for MarianMTModel in transformers.

Marian's vocabulary has one more token than tinylm's: the padding token, which has a zero embedding and also starts every
translation. tinylm represents the start without a token, so an export adds the padding token and an import removes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tinylm.data.bucketed_pairs import PairFraming, language_token
from tinylm.data.pairs import open_part
from tinylm.errors import InputError, WorkError
from tinylm.interchange import huggingface, verify
from tinylm.interchange.huggingface import write_json
from tinylm.model.base import Model
from tinylm.model.encoder_decoder import EncoderDecoder
from tinylm.model.positions import sinusoidal_table
from tinylm.model.sequence_to_sequence import START
from tinylm.recipe.encoder_decoder import EncoderDecoderSection
from tinylm.recipe.schema import ModelVariant
from tinylm.recipe.support import ANY, Supports, unsupported_parts
from tinylm.run import Run
from tinylm.text.pairs import SentencePair
from tinylm.tokenizer import END_OF_TEXT, Tokenizer, sentencepiece_files
from tinylm.translation.search import SearchOptions
from tinylm.translation.translator import Translator

CLASS = "MarianMTModel"
_MODEL_TYPE = "marian"
_PAD = "<pad>"
_VOCABULARY = "vocab.json"
_ACTIVATIONS = {"relu": "relu", "silu": "silu", "gelu_exact": "gelu", "gelu": "gelu_new"}
"""Values of `feed_forward` and their names in Marian's config.json."""
_ACTIVATION_ALIASES = {"swish": "silu", "gelu_pytorch_tanh": "gelu"}
_NO_LOGIT = -1e9
"""The bias of the padding token's logit, so that this token is never generated."""
_CHECKED_TRANSLATIONS = 8
_CHECKED_SENTENCES = 64
_CHECKED_TOKENS = 60
_SIZES = ("n_layer", "n_decoder_layer", "n_head", "n_embd", "context_length", "feed_forward_multiple", "n_inner")
SUPPORTS: Supports = {
    "architecture": ("encoder_decoder",),
    **dict.fromkeys((*_SIZES, "preset", "head_bias", "scale_embeddings", "zero_init_outputs", "dropout", "attention_dropout"), ANY),
    "init_from": ANY,
    "norm": ("layernorm",),
    "norm_position": ("post",),
    "norm_eps": (1e-5,),
    "norm_gain": (True,),
    "position": ("sinusoidal",),
    "feed_forward": tuple(_ACTIVATIONS),
    "bias": (True,),
    "tie_embeddings": ("all", "output"),
    "learned_start": (False,),
    "qk_norm": (False,),
    "embedding_norm": (False,),
}
"""The values of `model:` keys that MarianMTModel supports."""


def check_exportable(model: ModelVariant, separate_vocabulary: bool) -> None:
    """Raise `InputError` if MarianMTModel does not support the model, or if the model has separate vocabularies."""
    parts = unsupported_parts(model, SUPPORTS)
    if parts:
        hint = "train with the transformer preset"
        raise InputError(f"{CLASS} does not support model.{', model.'.join(parts)}", where="--to hf", hint=hint)
    if separate_vocabulary:
        hint = "train with data.vocabulary: shared"
        raise InputError("exporting separate vocabularies is not supported", where="--to hf", hint=hint)


def is_marian(source: Path) -> bool:
    """Whether the path is a folder that contains a Marian model."""
    file = source / "config.json"
    if not file.is_file():
        return False
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and config.get("model_type") == _MODEL_TYPE


# Weights.


@dataclass(frozen=True)
class _Layers:
    """The names of the blocks in one stack (encoder or decoder) in both libraries."""

    ours: str
    theirs: str
    count: int
    cross_attention: bool

    def attentions(self, layer: int) -> list[tuple[str, str, str]]:
        """Return the name prefixes of each attention layer in tinylm and in Marian, and of its norm in Marian."""
        ours, theirs = f"{self.ours}.blocks.{layer}", f"{self.theirs}.layers.{layer}"
        found = [(f"{ours}.attention", f"{theirs}.self_attn", f"{theirs}.self_attn_layer_norm")]
        if self.cross_attention:
            found.append((f"{ours}.cross_attention", f"{theirs}.encoder_attn", f"{theirs}.encoder_attn_layer_norm"))
        return found

    def linears(self, layer: int) -> list[tuple[str, str]]:
        """Return the name prefixes, in tinylm and in Marian, of all other modules with a weight and a bias."""
        ours, theirs = f"{self.ours}.blocks.{layer}", f"{self.theirs}.layers.{layer}"
        return [
            *((f"{own}.output", f"{other}.out_proj") for own, other, _ in self.attentions(layer)),
            *((f"{own}_norm", norm) for own, _, norm in self.attentions(layer)),
            (f"{ours}.feed_forward.input", f"{theirs}.fc1"),
            (f"{ours}.feed_forward.output", f"{theirs}.fc2"),
            (f"{ours}.feed_forward_norm", f"{theirs}.final_layer_norm"),
        ]


def _stacks(model: EncoderDecoderSection) -> tuple[_Layers, _Layers]:
    return (
        _Layers("encoder", "model.encoder", model.n_layer, False),
        _Layers("decoder", "model.decoder", model.decoder_layers, True),
    )


def export_state_dict(network: EncoderDecoder) -> dict[str, Tensor]:
    """Return the weights with MarianMTModel's names and shapes."""
    model, state = network.model, {name: tensor.detach() for name, tensor in network.state_dict().items()}
    tensors: dict[str, Tensor] = {}
    for stack in _stacks(model):
        for layer in range(stack.count):
            for ours, theirs in stack.linears(layer):
                tensors |= {f"{theirs}.{kind}": state[f"{ours}.{kind}"] for kind in ("weight", "bias")}
            for ours, theirs, _ in stack.attentions(layer):
                for kind in ("weight", "bias"):
                    parts = state[f"{ours}.qkv.{kind}"].chunk(3)
                    tensors |= {f"{theirs}.{name}_proj.{kind}": part for name, part in zip("qkv", parts, strict=True)}
        tensors[f"{stack.theirs}.embed_tokens.weight"] = _with_zero_row(state[f"{stack.ours}.embedding.weight"])
        tensors[f"{stack.theirs}.embed_positions.weight"] = sinusoidal_table(model.context_length, model.n_embd, interleaved=False)
    if model.tie_embeddings == "all":
        tensors["model.shared.weight"] = tensors["model.encoder.embed_tokens.weight"].clone()
    tensors["lm_head.weight"] = _with_zero_row(state["decoder.head.weight"])
    bias = state.get("decoder.head.bias", torch.zeros(network.vocab_size))
    tensors["final_logits_bias"] = torch.cat((bias, torch.tensor([_NO_LOGIT])))[None]
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}


def _with_zero_row(matrix: Tensor) -> Tensor:
    return torch.cat((matrix, matrix.new_zeros(1, matrix.shape[1])))


def import_state_dict(tensors: Mapping[str, Tensor], model: EncoderDecoderSection, pad: int, where: str) -> dict[str, Tensor]:
    """Return the weights with tinylm's names. Raises `InputError` if a weight is missing or the last token is not for padding."""

    def get(name: str) -> Tensor:
        if name not in tensors:
            raise InputError(f"the tensor {name} is missing", where=where)
        return tensors[name]

    state: dict[str, Tensor] = {}
    for stack in _stacks(model):
        for layer in range(stack.count):
            for ours, theirs in stack.linears(layer):
                state |= {f"{ours}.{kind}": get(f"{theirs}.{kind}") for kind in ("weight", "bias")}
            for ours, theirs, _ in stack.attentions(layer):
                for kind in ("weight", "bias"):
                    state[f"{ours}.qkv.{kind}"] = torch.cat([get(f"{theirs}.{name}_proj.{kind}") for name in "qkv"])
        name = f"{stack.theirs}.embed_tokens.weight"
        state[f"{stack.ours}.embedding.weight"] = _without_pad(get(name if name in tensors else "model.shared.weight"), pad, where)
    if model.head_bias:
        state["decoder.head.bias"] = get("final_logits_bias").flatten()[:pad]
    if model.tie_embeddings == "all":
        del state["decoder.embedding.weight"]
    return state


def _without_pad(matrix: Tensor, pad: int, where: str) -> Tensor:
    if matrix.shape[0] != pad + 1 or bool(matrix[pad].any()):
        raise InputError("the last token is not a padding token with a zero embedding", where=where)
    return matrix[:pad]


# Folders.


def _config(network: EncoderDecoder, end: int) -> dict[str, Any]:
    model, pad = network.model, network.vocab_size
    width = model.decoder.feed_forward_width
    return {
        "architectures": [CLASS],
        "model_type": _MODEL_TYPE,
        "vocab_size": pad + 1,
        "decoder_vocab_size": pad + 1,
        "d_model": model.n_embd,
        "encoder_layers": model.n_layer,
        "decoder_layers": model.decoder_layers,
        "encoder_attention_heads": model.n_head,
        "decoder_attention_heads": model.n_head,
        "encoder_ffn_dim": width,
        "decoder_ffn_dim": width,
        "max_position_embeddings": model.context_length,
        "activation_function": _ACTIVATIONS[model.feed_forward],
        "dropout": model.dropout,
        "attention_dropout": model.attention_dropout or 0.0,
        "activation_dropout": 0.0,
        "scale_embedding": model.scale_embeddings,
        "static_position_embeddings": True,
        "share_encoder_decoder_embeddings": model.tie_embeddings == "all",
        "tie_word_embeddings": True,
        "is_encoder_decoder": True,
        "pad_token_id": pad,
        "eos_token_id": end,
        "decoder_start_token_id": pad,
        "forced_eos_token_id": None,
        "torch_dtype": "float32",
    }


def write(folder: Path, translator: Translator, card: str, type: str) -> None:
    """Write an export to an empty folder. `type` is the storage type of the weights."""
    network, tokenizer = translator.network, translator.framing.target_tokenizer
    assert isinstance(network, EncoderDecoder)
    end, dtype = translator.framing.target_end, huggingface.DTYPES[type]
    config = {**_config(network, end), "torch_dtype": str(dtype).removeprefix("torch.")}
    write_json(folder / "config.json", config)
    generation = {name: config[name] for name in ("pad_token_id", "eos_token_id", "decoder_start_token_id")}
    search = {"num_beams": 5, "length_penalty": 1.0, "max_length": network.model.context_length}
    write_json(folder / "generation_config.json", {**generation, **search})
    tensors = {name: tensor.to(dtype) for name, tensor in export_state_dict(network).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "tokenizer.json").write_text(_tokenizer_json(tokenizer, network.vocab_size, end), encoding="utf-8")
    end_token = str(tokenizer.backend.id_to_token(end))
    unknown = end_token if tokenizer.unknown is None else str(tokenizer.backend.id_to_token(tokenizer.unknown))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": end_token,
            "pad_token": _PAD,
            "unk_token": unknown,
            "model_max_length": network.model.context_length,
            "clean_up_tokenization_spaces": False,
            "split_special_tokens": True,
        },
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _tokenizer_json(tokenizer: Tokenizer, pad: int, end: int) -> str:
    """Return a tokenizer.json with the padding token and a post-processor that appends the end token."""
    values = json.loads(tokenizer.backend.to_str())
    flags = {"special": True, "normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
    values["added_tokens"].append({"id": pad, "content": _PAD, **flags})
    name = str(tokenizer.backend.id_to_token(end))
    single = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": name, "type_id": 0}}]
    values["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {name: {"id": name, "ids": [end], "tokens": [name]}},
    }
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def model_card(name: str, parameters: int, recipe_yaml: str) -> str:
    """Return the text of README.md."""
    usage = (
        "```python\nfrom transformers import AutoTokenizer, MarianMTModel\n\n"
        'tokenizer = AutoTokenizer.from_pretrained(".")\nmodel = MarianMTModel.from_pretrained(".")\n'
        'inputs = tokenizer(["a sentence"], return_tensors="pt")\n'
        "print(tokenizer.batch_decode(model.generate(**inputs), skip_special_tokens=True))\n```"
    )
    return (
        "---\nlibrary_name: transformers\npipeline_tag: translation\ntags:\n- tinylm\n- translation\n---\n"
        f"# {name}\n\nA translation model with {parameters:,} parameters, trained with tinylm and exported for `{CLASS}`. "
        f"After the export, its logits and translations matched those of the original model.\n\n## Usage\n\n{usage}\n\n"
        f"## Recipe\n\n```yaml\n{recipe_yaml}```\n"
    )


# Verification.


def sample_pairs(run: Run) -> list[SentencePair]:
    """Return sentence pairs for comparing models: the run's held-out pairs, or English lines paired with themselves."""
    if (run.path / "heldout").exists():
        return list(open_part(run.path / "heldout", "heldout", run.tokenizer, run.tokenizer).pairs[:_CHECKED_SENTENCES])
    return english_pairs()


def english_pairs() -> list[SentencePair]:
    """Return lines of English text paired with themselves."""
    lines = [" ".join(line.split()) for line in verify.english_text().splitlines()]
    return [SentencePair(line, line, "") for line in lines if line][:_CHECKED_SENTENCES]


def check_folder(folder: Path, translator: Translator, pairs: Sequence[SentencePair]) -> tuple[float, int]:
    """Load the folder with transformers and compare ids, logits and translations (5 beams) on `pairs`.

    Return the largest difference between logits and the number of compared tokens. Raises `WorkError` if a comparison fails.
    """
    transformers = verify.require("transformers", "hf", "checking a Hugging Face folder")
    with huggingface.quiet(transformers):
        try:
            other_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            other = load(folder)
        except Exception as error:  # any exception means that the export is unusable
            raise WorkError(f"transformers cannot load the exported folder: {' '.join(str(error).split())[:300]}") from error
    pairs = pairs[:_CHECKED_SENTENCES]
    for pair in pairs:
        expected = translator.framing.source(translator.framing.source_tokenizer.encode(pair.source)).tolist()
        if list(other_tokenizer(pair.source)["input_ids"]) != expected:
            raise WorkError(
                f"the exported tokenizer tokenizes {pair.source[:60]!r} differently from the tinylm tokenizer",
                hint="nothing was saved",
            )
    difference, tokens = compare_logits(other, translator, pairs)
    verify.check_logits(difference, "the exported folder")
    with huggingface.quiet(transformers):
        _compare_translations(other, translator, pairs[:_CHECKED_TRANSLATIONS])
    return difference, tokens


def load(folder: Path) -> Any:
    """Load a folder's model in float32 with transformers."""
    import transformers

    options = {"use_safetensors": True, **huggingface.float32_argument(transformers)}
    return transformers.MarianMTModel.from_pretrained(folder, **options).eval()


@torch.no_grad()
def compare_logits(other: Any, translator: Translator, pairs: Sequence[SentencePair]) -> tuple[float, int]:
    """Return the largest difference between the logits of a MarianMTModel and a translator, and the number of target tokens."""
    framing, network = translator.framing, translator.network
    largest, tokens = 0.0, 0
    for pair in pairs:
        source = framing.source(framing.source_tokenizer.encode(pair.source)[: framing.source_limit])
        target = framing.target_tokenizer.encode(pair.target)[: framing.source_limit]
        ours = network(torch.tensor([[START, *target]]), source=torch.from_numpy(source)[None])
        start = [other.config.decoder_start_token_id, *target]
        theirs = other(input_ids=torch.from_numpy(source)[None], decoder_input_ids=torch.tensor([start])).logits
        largest = max(largest, float((ours - theirs[..., : network.vocab_size]).abs().max()))
        tokens += len(target) + 1
    return largest, tokens


def _compare_translations(other: Any, translator: Translator, pairs: Sequence[SentencePair]) -> None:
    framing, limit = translator.framing, min(_CHECKED_TOKENS, translator.network.model.context_length)
    options = SearchOptions(beams=5, length_penalty=0.0, max_length=limit)
    translations = translator.translate([pair.source for pair in pairs], options)
    for pair, ours in zip(pairs, translations, strict=True):
        ids = framing.source(framing.source_tokenizer.encode(" ".join(pair.source.split())))
        if len(ids) > framing.context_length:
            continue
        found = other.generate(
            input_ids=torch.from_numpy(ids)[None], num_beams=5, length_penalty=0.0, max_length=None, max_new_tokens=limit
        )
        known = [id for id in found[0].tolist() if id < framing.target_tokenizer.vocab_size]
        text, expected = " ".join(framing.target_tokenizer.decode(known).split()), ours.translations[0].text
        if text != expected:
            problem = f"translates {pair.source[:60]!r} as {text[:60]!r} instead of {expected[:60]!r}"
            raise WorkError(f"the exported folder {problem}", hint="nothing was saved")


# Import.


@dataclass(frozen=True)
class MarianFolder:
    """What a Marian folder contains. If there is one tokenizer for both languages, the tokenizers are the same object."""

    model: EncoderDecoderSection
    state: dict[str, Tensor]
    source_tokenizer: Tokenizer
    tokenizer: Tokenizer


def read(folder: Path, tokenizer_file: Path | None, *, trust_pickle: bool) -> MarianFolder:
    """Read the model section, the weights and the tokenizers. Raises `InputError` if the folder is not supported.

    The tokenizer is a tokenizer.json, or consists of source.spm, target.spm and vocab.json.
    """
    config, where = huggingface.read_config(folder), str(folder / "config.json")
    tensors = dict(huggingface.read_tensors(folder, trust_pickle))
    model = section_from_config(config, tensors, where)
    pad = config.get("pad_token_id")
    vocab_size = config.get("vocab_size")
    if type(pad) is not int or config.get("decoder_start_token_id") != pad or vocab_size != pad + 1:
        raise InputError("the last token must be the padding token and the start token", where=where)
    state = import_state_dict(tensors, model, pad, str(folder))
    if tokenizer_file is None and not (folder / "tokenizer.json").exists() and (folder / _VOCABULARY).exists():
        sides = [_sentencepiece_tokenizer(folder, side, config, pad) for side in ("source", "target")]
        return MarianFolder(model, state, *sides)
    if tokenizer_file is None and not (folder / "tokenizer.json").exists():
        hint = "pass a tokenizer.json with --tokenizer"
        raise InputError(f"has neither a tokenizer.json nor a {_VOCABULARY} with source.spm", where=str(folder), hint=hint)
    loaded = _without_pad_token(Tokenizer.load(tokenizer_file or folder), pad)
    tokenizer = huggingface.pad_vocabulary(huggingface.rename_end_of_text(loaded, config), pad, str(folder))
    return MarianFolder(model, state, tokenizer, tokenizer)


def _sentencepiece_tokenizer(folder: Path, side: str, config: Mapping[str, Any], pad: int) -> Tokenizer:
    """Read the tokenizer of one side: SIDE.spm divides a text into pieces, and vocab.json contains the ids of both sides' pieces.

    A control token such as `>>fra<<`, which selects the target language, is renamed to `<2fra>`.
    """
    file = folder / _VOCABULARY
    try:
        vocabulary = json.loads(file.read_text(encoding="utf-8"))
        valid = isinstance(vocabulary, dict) and sorted(vocabulary.values()) in (list(range(pad)), list(range(pad + 1)))
    except (OSError, ValueError, TypeError, RecursionError):
        valid = False
    end = config.get("eos_token_id")
    if not valid or type(end) is not int or not 0 <= end < pad:
        raise InputError("does not contain one id for each token", where=str(file))
    ids = {_language_token(token): id for token, id in vocabulary.items() if id != pad}
    ids = {END_OF_TEXT if id == end else token: id for token, id in ids.items()}
    if len(ids) != pad:
        raise InputError("contains a token twice", where=str(file))
    control = [END_OF_TEXT, *(token for token in ids if token.startswith("<2"))]
    backend = sentencepiece_files.read_with_ids(str(folder / f"{side}.spm"), ids, control, encodes_only=side == "source")
    return Tokenizer.from_text(backend.to_str())


def _language_token(token: str) -> str:
    return language_token(token[2:-2]) if token.startswith(">>") and token.endswith("<<") else token


def _without_pad_token(tokenizer: Tokenizer, pad: int) -> Tokenizer:
    values = json.loads(tokenizer.backend.to_str())
    values["added_tokens"] = [token for token in values["added_tokens"] if token["id"] != pad]
    values["post_processor"] = None  # tinylm adds the end token itself
    return Tokenizer.from_text(json.dumps(values))


def section_from_config(config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> EncoderDecoderSection:
    """Return the model section for Marian's config.json. Raises `InputError` for unsupported values."""
    activation = config.get("activation_function", "gelu")
    names = {theirs: ours for ours, theirs in _ACTIVATIONS.items()} | _ACTIVATION_ALIASES
    if activation not in names:
        raise InputError(f"the activation function {activation!r} is not supported", where=where)
    for key, expected in (("static_position_embeddings", True), ("tie_word_embeddings", True), ("normalize_before", False)):
        if config.get(key, expected) != expected:
            raise InputError(f"{key} {config[key]} is not supported", where=where)
    for key in ("attention_heads", "ffn_dim"):
        if config.get(f"encoder_{key}") != config.get(f"decoder_{key}"):
            raise InputError(f"encoder_{key} and decoder_{key} must be equal", where=where)
    if config.get("decoder_vocab_size", config.get("vocab_size")) != config.get("vocab_size"):
        raise InputError("separate vocabularies are not supported", where=where)
    bias = tensors.get("final_logits_bias")
    pad = config.get("pad_token_id")
    has_bias = bias is not None and type(pad) is int and bool(bias.flatten()[:pad].any())
    try:
        model = EncoderDecoderSection.model_validate(
            {
                "preset": "transformer",
                "n_layer": config["encoder_layers"],
                "n_decoder_layer": config["decoder_layers"],
                "n_head": config["encoder_attention_heads"],
                "n_embd": config["d_model"],
                "n_inner": config["encoder_ffn_dim"],
                "context_length": config["max_position_embeddings"],
                "feed_forward": names[activation],
                "scale_embeddings": bool(config.get("scale_embedding", False)),
                "tie_embeddings": "all" if config.get("share_encoder_decoder_embeddings", True) else "output",
                "head_bias": has_bias,
                "dropout": float(config.get("dropout", 0.1)),
                "attention_dropout": float(config.get("attention_dropout", 0.0)),
            }
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"not a valid Marian configuration: {' '.join(str(error).split())}", where=where) from None
    for key, problem in model.problems():
        raise InputError(f"invalid model configuration: {key} {problem}", where=where)
    return model


def compare_with_transformers(source: Path, network: Model, folder: MarianFolder) -> tuple[float, int, str] | str:
    """Return the largest difference between logits, the number of compared tokens, and the version of transformers.

    If transformers cannot load the folder, return the reason as a string instead.
    """
    if not list(source.glob("*.safetensors")):
        return "transformers cannot read this format"
    try:
        import transformers
    except ImportError:
        return 'transformers is not installed (pip install "tinylm[hf]")'
    assert isinstance(network, EncoderDecoder)
    with huggingface.quiet(transformers):
        try:
            other = load(source)
        except Exception as error:  # the import also works without a reference; the caller reports the reason as a warning
            return f"transformers cannot load it: {' '.join(str(error).split())[:200]}"
    translator = Translator(network, PairFraming(folder.source_tokenizer, folder.tokenizer, network.model.context_length))
    difference, tokens = compare_logits(other, translator, english_pairs()[:16])
    return difference, tokens, f"transformers {transformers.__version__}"
