"""Write and read Hugging Face folders: config.json, safetensors weights, tokenizer files and the model card.

If one of transformers' own classes supports a model, the folder is written for that class (see `hf_architectures`). Otherwise, the
folder includes `modeling_tinylm.py`. Only `check_export` and `load_model` require transformers.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from types import ModuleType
from typing import Any

import tokenizers
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import AddedToken
from torch import Tensor

from tinylm.errors import InputError, WorkError
from tinylm.interchange import chat_files, hf_architectures, verify
from tinylm.interchange.generation_check import Snippet, check_generation
from tinylm.model.base import Model
from tinylm.recipe.schema import DecoderSection, ModelVariant, to_plain
from tinylm.recipe.support import ANY, COMMON, Supports, check_supported
from tinylm.recipe.values import show
from tinylm.tokenizer import Tokenizer
from tinylm.tokenizer.chat_template import ChatEncoder
from tinylm.tokenizer.tokenizer import END_OF_TEXT

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
"""The data types in which weights can be stored."""
MODELING_FILE = "modeling_tinylm.py"
_MODEL_TYPE = "tinylm"
_MODEL_CLASS = "TinylmForCausalLM"
_SHARED_KEYS = (
    "context_length",
    "n_layer",
    "n_head",
    "n_embd",
    "norm",
    "norm_position",
    "norm_eps",
    "norm_gain",
    "position",
    "feed_forward",
    "bias",
    "qk_norm",
    "qk_gain",
    "embedding_norm",
    "ngram_embeddings",
    "ngram_rows",
    "ngram_width",
    "value_embeddings",
    "value_residual",
    "embedding_shortcut",
    "parallel_residual",
    "logit_softcap",
)
"""Keys in a recipe's `model:` section that have the same name in `TinylmConfig`."""
_NEWER_KEYS = {
    "attention_window": "attention_window",
    "attention_pattern": "attention_pattern",
    "attention_softcap": "attention_softcap",
    "embedding_scale": "embedding_scale",
    "head_bias": "head_bias",
    "qk_norm_joint": "qk_norm_joint",
    "shifted_key_heads": "shifted_key_heads",
    "rope_theta_local": "rotary_base_local",
    "rope_fraction": "rotary_fraction",
    "rope_pattern": "rotary_pattern",
    "rope_scaling": "rotary_scaling",
}
"""Keys that have a different name in `TinylmConfig`. Folders from older versions do not have them.

The names do not begin with `rope_`, because transformers interprets such names itself.
"""
SUPPORTS: Supports = {
    **COMMON,
    "attention_window": ANY,
    "attention_pattern": lambda model: {*model.attention_pattern} <= {"local", "global"},
    "attention_softcap": ANY,
    "norm_position": ("pre", "post", "output", "both"),
    "feed_forward": ("gelu", "gelu_exact", "relu", "relu2", "swiglu", "geglu"),
    "embedding_scale": ANY,
    "head_bias": ANY,
    "qk_norm_joint": ANY,
    "shifted_key_heads": ANY,
    "rope_theta_local": ANY,
    "rope_fraction": ANY,
    "rope_pattern": lambda model: {*model.rope_pattern} <= {"rope", "none"},
    "rope_scaling": lambda model: model.rope_scaling is None or model.rope_scaling.type in ("linear", "llama3", "yarn"),
}
"""The values of `model:` keys that `modeling_tinylm.py` supports."""


# Export.


def select_class(model: ModelVariant) -> tuple[str, tuple[str, ...]]:
    """Return the name of the class that loads `model`, and the model parts for which tinylm's own class is needed.

    Raises `InputError` if tinylm's own class does not support the model either.
    """
    family, unsupported = hf_architectures.find_family(model)
    if family is None:
        check_supported(model, SUPPORTS, "export to Hugging Face", "--to hf")
    return (hf_architectures.CLASSES[family] if family else _MODEL_CLASS), unsupported


def write(folder: Path, network: Model, tokenizer: Tokenizer, card: str, type: str = "f32") -> None:
    """Write an export to an empty folder. `card` is the text of README.md, and `type` is a key of `DTYPES`.

    Raises `InputError` if no class supports the model (see `select_class`).
    """
    model = hf_architectures.decoder_section(network.model)
    select_class(model)
    family, _ = hf_architectures.find_family(model)
    state = network.state_dict()
    if family:
        config = hf_architectures.make_config(model, family, network.vocab_size)
        tensors = hf_architectures.export_state_dict(state, model, family)
    else:
        config = _tinylm_config(model, network.vocab_size)
        tensors = {name: tensor.contiguous() for name, tensor in network.stored_weights().items()}
        shutil.copyfile(Path(__file__).with_name(MODELING_FILE), folder / MODELING_FILE)
    tensors = {name: tensor.to(DTYPES[type]) for name, tensor in tensors.items()}
    config["torch_dtype"] = str(DTYPES[type]).removeprefix("torch.")
    end = tokenizer.end_of_text
    write_json(folder / "config.json", {**config, "bos_token_id": end, "eos_token_id": end})
    write_json(folder / "generation_config.json", {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end})
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "tokenizer.json").write_text(_tokenizer_json(tokenizer), encoding="utf-8")
    write_json(folder / "tokenizer_config.json", _tokenizer_config(tokenizer, model.context_length))
    (folder / "README.md").write_text(card, encoding="utf-8")


def write_json(path: Path, value: Mapping[str, Any] | list[Any]) -> None:
    """Write a JSON file in the format that transformers uses."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _tinylm_config(model: DecoderSection, vocab_size: int) -> dict[str, Any]:
    values = to_plain(model.model_dump())
    shared = {key: values[key] for key in _SHARED_KEYS} | {name: values[key] for key, name in _NEWER_KEYS.items()}
    return {
        "architectures": [_MODEL_CLASS],
        "auto_map": {
            "AutoConfig": f"{Path(MODELING_FILE).stem}.TinylmConfig",
            "AutoModel": f"{Path(MODELING_FILE).stem}.TinylmModel",
            "AutoModelForCausalLM": f"{Path(MODELING_FILE).stem}.{_MODEL_CLASS}",
        },
        "model_type": _MODEL_TYPE,
        "vocab_size": vocab_size,
        **shared,
        "ngram_pad_id": vocab_size,
        "n_kv_head": model.kv_heads,
        "head_dim": model.head_width,
        "n_inner": model.feed_forward_width,
        "rotary_base": model.rope_theta or 10000.0,
        "tie_word_embeddings": model.tie_embeddings,
        "torch_dtype": "float32",
    }


def _tokenizer_json(tokenizer: Tokenizer) -> str:
    """Return tokenizer.json without a post-processor that adds special tokens, because tinylm does not add any to text."""
    values = json.loads(tokenizer.backend.to_str())
    if tokenizer.backend.num_special_tokens_to_add(is_pair=False):
        values["post_processor"] = None
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def _tokenizer_config(tokenizer: Tokenizer, context_length: int) -> dict[str, Any]:
    special = {"bos_token": tokenizer.end_of_text, "eos_token": tokenizer.end_of_text, "pad_token": tokenizer.end_of_text}
    # As in GPT-2's tokenizer: CTranslate2 requires an unknown token, but no text is encoded to it.
    special["unk_token"] = tokenizer.end_of_text if tokenizer.unknown is None else tokenizer.unknown
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: tokenizer.backend.id_to_token(id) for name, id in special.items() if id is not None},
        "model_max_length": context_length,
        "model_input_names": ["input_ids", "attention_mask"],  # transformers 4 otherwise adds token_type_ids, which GPT-2 embeds
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # "<|endoftext|>" in a text is plain text and does not end the document
        "padding_side": "left",
    }


# Verification.


def round_weights(network: Model, type: str) -> Model:
    """Return a copy of the network with float32 weights that are rounded to `type`. Raises `InputError` on overflow."""
    rounded = copy.deepcopy(network)
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            parameter.copy_(parameter.to(DTYPES[type]).float())
            if not parameter.isfinite().all():
                raise InputError(f"{name} does not fit in the range of {type}", where="--type", hint="use f32 or bf16")
    return rounded


def check_export(
    folder: Path, network: Model, tokenizer: Tokenizer, text: str, snippet: Snippet, chat: ChatEncoder | None = None
) -> tuple[float, int]:
    """Load the folder with transformers and compare it with `network`.

    Returns the largest difference between logits on `text` and the number of compared tokens. Raises `WorkError` if the logits, the
    token ids or the generated text differ, and `InputError` if transformers is not installed.
    """
    transformers = verify.require("transformers", "hf", "checking a Hugging Face folder")
    own_class = (folder / MODELING_FILE).exists()
    with quiet(transformers):
        loader = transformers.PreTrainedTokenizerFast if own_class else transformers.AutoTokenizer
        try:
            other_tokenizer = loader.from_pretrained(folder)
            other = load_model(folder, folder / MODELING_FILE)
        except Exception as error:  # any exception means that the export is unusable
            raise WorkError(f"transformers cannot load the exported folder: {' '.join(str(error).split())[:300]}") from error
        options = {} if chat is None else {"split_special_tokens": True}

        def encode(probe: str) -> list[int]:
            return list(other_tokenizer(probe, **options)["input_ids"])

        verify.check_ids(tokenizer, encode, text, "the exported tokenizer")
        if chat is not None:
            chat_files.check_ids(other_tokenizer, chat)
    rows = verify.windows([tokenizer.end_of_text or 0, *tokenizer.encode(text)], network.model.context_length)
    difference = verify.largest_difference(network, lambda ids: other(ids).logits, rows)
    verify.check_logits(difference, "the exported folder")
    with quiet(transformers):
        check_generation(other, other_tokenizer, network, tokenizer, snippet, text)
    return difference, rows.numel()


def load_model(folder: Path, code: Path) -> Any:
    """Load the folder's model in float32 with transformers. `code` is the modeling file to use for tinylm's own class."""
    import transformers

    if read_config(folder).get("model_type") == _MODEL_TYPE:
        return (
            getattr(_import_file(code), _MODEL_CLASS)
            .from_pretrained(folder, use_safetensors=True, **float32_argument(transformers))
            .eval()
        )
    safe_options = {"trust_remote_code": False, "use_safetensors": True}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **safe_options, **float32_argument(transformers)).eval()


def float32_argument(transformers: Any) -> dict[str, torch.dtype]:
    """Return the `from_pretrained` argument for float32. transformers 5 renamed it from `torch_dtype` to `dtype`."""
    return {"dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype": torch.float32}


def _import_file(code: Path) -> ModuleType:
    """Import a Python file as a module. Unlike `trust_remote_code`, do not copy the file to the transformers module cache."""
    name = "tinylm_modeling"
    spec = importlib.util.spec_from_file_location(name, code)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Silence transformers' log messages, progress bars and warnings."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


# Import.


def read(
    folder: Path, tokenizer_file: Path | None = None, *, trust_pickle: bool = False
) -> tuple[DecoderSection, dict[str, Tensor], Tokenizer]:
    """Read the model section, state dict and tokenizer from a folder.

    `tokenizer_file` is a tokenizer.json to use instead of the folder's own. `trust_pickle` allows reading pytorch_model.bin.
    Raises `InputError` if anything is missing, damaged or not supported.
    """
    config = read_config(folder)
    tensors = dict(read_tensors(folder, trust_pickle))
    where = str(folder)
    if config.get("model_type") == _MODEL_TYPE:
        model = _tinylm_model_section(config, where)
        state = tensors
    else:
        model = hf_architectures.model_section_from_config(config, tensors, str(folder / "config.json"))
        state = hf_architectures.import_state_dict(tensors, model, str(config["model_type"]), where, config)
    tokenizer = Tokenizer.load(folder if tokenizer_file is None else tokenizer_file)
    return model, state, tokenizer if tokenizer_file else rename_end_of_text(tokenizer, config)


def read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if path.exists() and not path.is_file():  # reading a named pipe would wait forever
        raise InputError("is not a file", where=str(path))
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"config.json: {error.strerror}", where=str(folder), hint="not a Hugging Face folder") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"not valid JSON: {error}", where=str(path)) from None
    if not isinstance(config, dict):
        raise InputError("expected a JSON object", where=str(path))
    return config


def _tinylm_model_section(config: Mapping[str, Any], where: str) -> DecoderSection:
    try:
        values = {key: config[key] for key in (*_SHARED_KEYS, "n_kv_head", "head_dim", "n_inner")}
        values |= {key: config[name] for key, name in _NEWER_KEYS.items() if name in config}
        values["tie_embeddings"] = config["tie_word_embeddings"]
        if values["position"] == "rope":
            values["rope_theta"] = float(config["rotary_base"])
        if values["ngram_embeddings"] and config.get("ngram_pad_id", config["vocab_size"]) != config["vocab_size"]:
            raise InputError("a model with n-gram embeddings cannot be imported if its embeddings were resized", where=where)
        model = DecoderSection.model_validate(values)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"config.json was not written by tinylm: {' '.join(str(error).split())}", where=where) from None
    for key, problem in model.problems():
        raise InputError(f"invalid model configuration: {key} {problem}", where=where)
    return model


def read_tensors(folder: Path, trust_pickle: bool) -> Iterator[tuple[str, Tensor]]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise InputError(f"invalid index of weight shards: {error!r}", where=str(index)) from None
    elif (folder / "model.safetensors").exists():
        files = ["model.safetensors"]
    elif (folder / "pytorch_model.bin").exists():
        yield from load_pickle(folder / "pytorch_model.bin", trust_pickle).items()
        return
    else:
        raise InputError("found neither model.safetensors nor model.safetensors.index.json", where=str(folder))
    for file in files:
        if not isinstance(file, str) or Path(file).name != file:
            raise InputError(f"refers to a file outside the folder: {show(file)}", where=str(index))
        yield from read_safetensors(folder / file)


def read_safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and value of every tensor in a file. Raises `InputError` if the file is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  `opened` is not a mapping
                yield name, opened.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot be read: {error}", where=str(path)) from None


def load_pickle(path: Path, trusted: bool) -> dict[str, Any]:
    """Load a `torch.save` file with `weights_only=True`, which never executes code from the file.

    Raises `InputError` if pickles are not trusted, or if the file is not a dictionary of tensors and plain values.
    """
    with open(path, "rb") as opened:
        magic = opened.read(4)
    if not magic.startswith((b"PK", b"\x80")):
        raise InputError("neither a Hugging Face folder, a torch.save file nor an ARPA file", where=str(path))
    if not trusted:
        raise InputError(
            "the file is a pickle, and loading a pickle can execute code",
            where=str(path),
            hint="--trust-pickle loads tensors and plain values only; safetensors files do not need it",
        )
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch and pickle raise many types; do not show torch's advice to set weights_only=False
        raise InputError("contains objects other than tensors and plain values, or is damaged", where=str(path)) from None
    if not isinstance(value, dict):
        raise InputError(f"contains a {type(value).__name__} instead of a dictionary", where=str(path))
    return value


def rename_end_of_text(tokenizer: Tokenizer, config: Mapping[str, Any]) -> Tokenizer:
    """Rename the token with the `eos_token_id` from config.json to `<|endoftext|>`, unless the tokenizer already has this token."""
    end = config.get("eos_token_id")
    end = end[0] if isinstance(end, list) and end else end
    if tokenizer.end_of_text is not None or type(end) is not int or not 0 <= end < tokenizer.vocab_size:
        return tokenizer
    if tokenizer.backend.id_to_token(end) is None:
        return tokenizer
    values = json.loads(tokenizer.backend.to_str())
    old_name = tokenizer.backend.id_to_token(end)
    values["post_processor"] = None  # the post-processor can refer to the old name, and tinylm does not use it
    values["added_tokens"] = [token for token in values["added_tokens"] if token["id"] != end]
    vocabulary = values["model"].get("vocab")
    if isinstance(vocabulary, dict):
        values["model"]["vocab"] = {END_OF_TEXT if token == old_name else token: id for token, id in vocabulary.items()}
    token = {"id": end, "content": END_OF_TEXT, "special": True, "normalized": False}
    values["added_tokens"].append({**token, "single_word": False, "lstrip": False, "rstrip": False})
    values["added_tokens"].sort(key=lambda token: token["id"])
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(values)))


def pad_vocabulary(tokenizer: Tokenizer, rows: int, where: str) -> Tokenizer:
    """Add placeholder tokens until the tokenizer has one id per embedding row. No text is encoded to a placeholder.

    If there is no end-of-text token, the first new token becomes one. Raises `InputError` if there are more ids than rows.
    """
    missing = rows - tokenizer.vocab_size
    if missing < 0:
        raise InputError(f"the tokenizer has {tokenizer.vocab_size:,} ids, but the embedding has only {rows:,} rows", where=where)
    if missing:
        backend = tokenizer.backend
        names = [f"<|padding_{tokenizer.vocab_size + number}|>" for number in range(missing)]
        if tokenizer.end_of_text is None:
            names[0] = END_OF_TEXT
        backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
        tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(backend.to_str()))
    return tokenizer
