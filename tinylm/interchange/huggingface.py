"""Hugging Face folders, written from a run and read back: config.json, weights in safetensors, tokenizer, model card.

What one of transformers' own classes computes is written for that class (`hf_architectures`); for anything else the folder carries
`modeling_tinylm.py`. Nothing here needs transformers but `verify`.
"""

from __future__ import annotations

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
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from torch import Tensor

from tinylm.errors import InputError, WorkError
from tinylm.interchange import hf_architectures, verify
from tinylm.model.transformer import Transformer
from tinylm.recipe.schema import ModelSection
from tinylm.tokenizer import Tokenizer
from tinylm.tokenizer.tokenizer import END_OF_TEXT

MODELING = "modeling_tinylm.py"
_OWN = "tinylm"
_CLASS = "TinylmForCausalLM"
_SAME_NAME = (
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
"""Keys of a recipe's model section that `TinylmConfig` spells the same."""


# Writing.


def class_of(model: ModelSection) -> tuple[str, tuple[str, ...]]:
    """The class that loads such a model, and for our own the parts that the nearest stock class lacks."""
    name, lacking = hf_architectures.family(model)
    return (hf_architectures.CLASSES[name] if name else _CLASS), lacking


def write(folder: Path, network: Transformer, tokenizer: Tokenizer, card: str) -> None:
    """Fill an empty folder."""
    model = network.model
    name, _ = hf_architectures.family(model)
    state = network.state_dict()
    if name:
        config, tensors = (
            hf_architectures.config_of(model, name, network.vocab_size),
            hf_architectures.tensors_of(state, model, name),
        )
    else:
        config = _own_config(model, network.vocab_size)
        tensors = {key: t.contiguous() for key, t in state.items() if not (model.tie_embeddings and key == "head.weight")}
        shutil.copyfile(Path(__file__).with_name(MODELING), folder / MODELING)
    end = tokenizer.end_of_text
    _json(folder / "config.json", {**config, "bos_token_id": end, "eos_token_id": end})
    _json(folder / "generation_config.json", {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end})
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "tokenizer.json").write_text(_bare(tokenizer), encoding="utf-8")
    _json(folder / "tokenizer_config.json", _tokenizer_config(tokenizer, model.context_length))
    (folder / "README.md").write_text(card, encoding="utf-8")


def _json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _own_config(model: ModelSection, vocab_size: int) -> dict[str, Any]:
    shared = {key: getattr(model, key) for key in _SAME_NAME}
    return {
        "architectures": [_CLASS],
        "auto_map": {
            "AutoConfig": f"{Path(MODELING).stem}.TinylmConfig",
            "AutoModelForCausalLM": f"{Path(MODELING).stem}.{_CLASS}",
        },
        "model_type": _OWN,
        "vocab_size": vocab_size,
        **shared,
        "ngram_embeddings": list(model.ngram_embeddings),
        "n_kv_head": model.kv_heads,
        "head_dim": model.head_width,
        "n_inner": model.feed_forward_width,
        "rotary_base": model.rope_theta or 10000.0,
        "tie_word_embeddings": model.tie_embeddings,
        "torch_dtype": "float32",
    }


def _bare(tokenizer: Tokenizer) -> str:
    """tokenizer.json without a post-processor that would add tokens: there as here, a text's ids are the text's."""
    values = json.loads(tokenizer.backend.to_str())
    if tokenizer.backend.num_special_tokens_to_add(is_pair=False):
        values["post_processor"] = None
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def _tokenizer_config(tokenizer: Tokenizer, context_length: int) -> dict[str, Any]:
    special = {"bos_token": tokenizer.end_of_text, "eos_token": tokenizer.end_of_text, "pad_token": tokenizer.end_of_text}
    if tokenizer.unknown is not None:
        special["unk_token"] = tokenizer.unknown
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: tokenizer.backend.id_to_token(id) for name, id in special.items() if id is not None},
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # a text that holds <|endoftext|> holds thirteen characters, not the end of a document
        "padding_side": "left",
    }


# Proving.


def check_export(folder: Path, network: Transformer, tokenizer: Tokenizer, text: str) -> tuple[float, int]:
    """Load the folder with transformers: (largest difference of logits on `text`, tokens compared).

    Raises `WorkError` when it is not the same model or splits text into other tokens, `InputError` without transformers.
    """
    transformers = verify.require("transformers", "hf", "checking a Hugging Face folder")
    own = (folder / MODELING).exists()
    with quiet(transformers):
        loader = transformers.PreTrainedTokenizerFast if own else transformers.AutoTokenizer
        try:
            theirs = loader.from_pretrained(folder)
            other = load_model(folder, folder / MODELING)
        except Exception as error:  # whatever another library says of a folder is a reason not to keep it
            raise WorkError(f"transformers cannot load what was written: {' '.join(str(error).split())[:300]}") from error
        verify.check_ids(tokenizer, lambda line: list(theirs(line)["input_ids"]), text, "the folder")
    rows = verify.windows([tokenizer.end_of_text or 0, *tokenizer.encode(text)], network.model.context_length)
    difference = verify.largest_difference(network, lambda ids: other(ids).logits, rows)
    verify.check_same(difference, "the exported folder")
    return difference, rows.numel()


def load_model(folder: Path, code: Path) -> Any:
    """The folder's model in float32, as transformers computes it; a tinylm model with the class in the file `code`."""
    import transformers

    if _config(folder).get("model_type") == _OWN:
        return getattr(_module(code), _CLASS).from_pretrained(folder, use_safetensors=True, **in_float32(transformers)).eval()
    safely = {"trust_remote_code": False, "use_safetensors": True}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **safely, **in_float32(transformers)).eval()


def in_float32(transformers: Any) -> dict[str, torch.dtype]:
    """The argument of `from_pretrained` by its name in this version."""
    return {"dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype": torch.float32}


def _module(code: Path) -> ModuleType:
    """A file as a module, outside of the user's cache of such modules."""
    name = "tinylm_modeling"
    spec = importlib.util.spec_from_file_location(name, code)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """transformers without its progress bars and advice."""
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


# Reading.


def read(
    folder: Path, tokenizer_file: Path | None = None, *, trust_pickle: bool = False
) -> tuple[ModelSection, dict[str, Tensor], Tokenizer]:
    """The parts, weights and tokenizer of a folder. Raises `InputError` for what is missing, damaged or not computed here."""
    config = _config(folder)
    tensors = dict(_tensors(folder, trust_pickle))
    where = str(folder)
    if config.get("model_type") == _OWN:
        model = _own_model(config, where)
        state = tensors
    else:
        model = hf_architectures.model_of(config, tensors, str(folder / "config.json"))
        state = hf_architectures.state_of(tensors, model, str(config["model_type"]), where)
    tokenizer = read_tokenizer(folder if tokenizer_file is None else tokenizer_file)
    return model, state, tokenizer if tokenizer_file else _with_end_of_text(tokenizer, config)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"config.json: {error.strerror}", where=str(folder), hint="a Hugging Face folder has one") from None
    except ValueError as error:
        raise InputError(f"not JSON: {error}", where=str(path)) from None
    if not isinstance(config, dict):
        raise InputError("not an object", where=str(path))
    return config


def _own_model(config: Mapping[str, Any], where: str) -> ModelSection:
    renamed = {"n_kv_head": "n_kv_head", "head_dim": "head_dim", "n_inner": "n_inner", "tie_word_embeddings": "tie_embeddings"}
    try:
        values = {key: config[key] for key in _SAME_NAME} | {ours: config[key] for key, ours in renamed.items()}
        rope = {"rope_theta": float(config["rotary_base"])} if values["position"] == "rope" else {}
        return ModelSection.model_validate({**values, **rope})
    except (KeyError, ValueError) as error:
        raise InputError(f"config.json is not what tinylm writes: {error}", where=where) from None


def _tensors(folder: Path, trust_pickle: bool) -> Iterator[tuple[str, Tensor]]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise InputError(f"not an index of shards: {error!r}", where=str(index)) from None
    elif (folder / "model.safetensors").exists():
        files = ["model.safetensors"]
    elif (folder / "pytorch_model.bin").exists():
        yield from unpickled(folder / "pytorch_model.bin", trust_pickle).items()
        return
    else:
        raise InputError("no model.safetensors, nor shards with an index", where=str(folder))
    for file in files:
        if Path(file).name != file:
            raise InputError(f"names a file elsewhere: {file}", where=str(index))
        yield from read_safetensors(folder / file)


def read_safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a file. Raises `InputError` when it is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  not a mapping
                yield name, opened.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot be read: {error}", where=str(path)) from None


def unpickled(path: Path, trusted: bool) -> dict[str, Any]:
    """A file of torch.save, read with `weights_only=True`, which builds tensors and plain values and calls nothing else."""
    with open(path, "rb") as opened:
        begins = opened.read(4)
    if not begins.startswith((b"PK", b"\x80")):
        raise InputError("is neither a Hugging Face folder nor a file of torch.save", where=str(path))
    if not trusted:
        raise InputError(
            "is a pickle, which can execute code when it is opened",
            where=str(path),
            hint="--trust-pickle reads it all the same, plain values and tensors only; safetensors needs no trust",
        )
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch and pickle raise classes of many kinds; what torch advises, to trust it fully, is not done here
        raise InputError("holds more than tensors and plain values, or is damaged", where=str(path)) from None
    if not isinstance(value, dict):
        raise InputError(f"holds a {type(value).__name__}, not a dictionary", where=str(path))
    return value


def read_tokenizer(path: Path) -> Tokenizer:
    """Of a folder (tokenizer.json, else GPT-2's vocab.json and merges.txt), or of a tokenizer.json."""
    if not path.is_dir():
        return Tokenizer.load(path)
    if (path / "tokenizer.json").exists():
        return Tokenizer.load(path / "tokenizer.json")
    vocabulary, merges = path / "vocab.json", path / "merges.txt"
    if not (vocabulary.exists() and merges.exists()):
        raise InputError("no tokenizer.json, nor vocab.json and merges.txt", where=str(path), hint="name one with --tokenizer")
    try:
        backend = tokenizers.Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
    except Exception as error:  # tokenizers raises plain Exception
        raise InputError(f"not GPT-2's vocabulary: {error}", where=str(vocabulary)) from None
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if backend.token_to_id(END_OF_TEXT) is not None:
        backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return Tokenizer(backend)


def _with_end_of_text(tokenizer: Tokenizer, config: Mapping[str, Any]) -> Tokenizer:
    """Where the end of text has a name that is not known here, the token that config.json says it is gets the usual one."""
    end = config.get("eos_token_id")
    end = end[0] if isinstance(end, list) and end else end
    if tokenizer.end_of_text is not None or not isinstance(end, int) or tokenizer.backend.id_to_token(end) is None:
        return tokenizer
    values = json.loads(tokenizer.backend.to_str())
    written = tokenizer.backend.id_to_token(end)
    values["post_processor"] = None  # it may name the token, and is not used here
    values["added_tokens"] = [token for token in values["added_tokens"] if token["id"] != end]
    vocabulary = values["model"].get("vocab")
    if isinstance(vocabulary, dict):
        values["model"]["vocab"] = {END_OF_TEXT if token == written else token: id for token, id in vocabulary.items()}
    token = {"id": end, "content": END_OF_TEXT, "special": True, "normalized": False}
    values["added_tokens"].append({**token, "single_word": False, "lstrip": False, "rstrip": False})
    values["added_tokens"].sort(key=lambda token: token["id"])
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(values)))


def padded(tokenizer: Tokenizer, rows: int, where: str) -> Tokenizer:
    """A tokenizer with as many ids as the embedding has rows: rows beyond it, which no text reaches, get names of their own.

    Raises `InputError` for a tokenizer with more ids than rows.
    """
    missing = rows - tokenizer.vocab_size
    if missing < 0:
        raise InputError(f"the tokenizer has {tokenizer.vocab_size:,} ids, the embedding {rows:,} rows", where=where)
    if missing:
        backend = tokenizer.backend
        names = [f"<|padding_{tokenizer.vocab_size + number}|>" for number in range(missing)]
        if tokenizer.end_of_text is None:
            names[0] = END_OF_TEXT
        backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
        tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(backend.to_str()))
    return tokenizer
