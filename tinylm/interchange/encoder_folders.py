"""Read and write Hugging Face folders of encoders and classifiers, and compare them with transformers.

Exported folders work with the transformers pipelines `fill-mask`, `text-classification` and `feature-extraction`: the tokenizer
puts [CLS] before a text and [SEP] after it, and recognizes [MASK] in it. The folder of an encoder without a head also works with
sentence-transformers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from safetensors.torch import save_file

from tinylm.data.framing import Framing
from tinylm.errors import InputError, WorkError
from tinylm.evaluation.filling import fill
from tinylm.interchange import encoders, huggingface, verify
from tinylm.interchange.encoders import ImportedEncoder
from tinylm.interchange.huggingface import write_json
from tinylm.model.base import Model
from tinylm.model.classifier import SequenceClassifier
from tinylm.recipe.encoder import EncoderSection
from tinylm.recipe.schema import ObjectiveVariant
from tinylm.tokenizer import Tokenizer
from tinylm.tokenizer.control_tokens import ControlTokens, joins_spaces

_VOCABULARY = "vocab.txt"
_BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_ROBERTA_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
"""The special tokens in vocab.txt, and in vocab.json, neither of which says that they are special."""


def is_encoder(folder: Path) -> bool:
    """Whether a folder contains an encoder that `read` supports."""
    return (
        folder.is_dir()
        and (folder / "config.json").is_file()
        and huggingface.read_config(folder).get("model_type") in encoders.KINDS
    )


def read(folder: Path, tokenizer_file: Path | None, *, trust_pickle: bool) -> tuple[ImportedEncoder, Tokenizer]:
    """Read the model and the tokenizer from a folder. Raises `InputError` if anything is missing, damaged or unsupported."""
    config = huggingface.read_config(folder)
    tensors = dict(huggingface.read_tensors(folder, trust_pickle))
    imported = encoders.read(config, tensors, str(folder))
    if tokenizer_file is not None:
        tokenizer = Tokenizer.load(tokenizer_file)
    elif (folder / "tokenizer.json").exists():
        tokenizer = Tokenizer.load(folder)
    elif (folder / _VOCABULARY).exists():
        tokenizer = _from_vocabulary(folder)
    else:
        tokenizer = _with_special_tokens(Tokenizer.load(folder).backend, _ROBERTA_TOKENS)
    rows = imported.state.get("embedding.weight", imported.state.get("body.embedding.weight"))
    assert rows is not None
    tokenizer = huggingface.pad_vocabulary(tokenizer, rows.shape[0], str(folder))
    ControlTokens.of(tokenizer)
    return imported, tokenizer


@dataclass(frozen=True)
class SentenceSettings:
    """How sentence-transformers computes sentence vectors with the model in a folder."""

    max_tokens: int | None = None
    """Longer texts are truncated. None means the context length of the model."""
    normalize: bool = False
    """Whether vectors are scaled to length 1."""


def sentence_settings(folder: Path) -> SentenceSettings:
    """Read the files of sentence-transformers, if there are any. Raises `InputError` if a file is damaged."""
    limits, modules = (_read_json(folder / name) for name in ("sentence_bert_config.json", "modules.json"))
    max_tokens = limits.get("max_seq_length") if isinstance(limits, dict) else None
    types = [str(module.get("type")) for module in modules if isinstance(module, dict)] if isinstance(modules, list) else []
    normalize = any(type.rpartition(".")[2] == "Normalize" for type in types)
    return SentenceSettings(max_tokens if isinstance(max_tokens, int) and max_tokens > 0 else None, normalize)


def _read_json(file: Path) -> Any:
    """Return the contents of a JSON file, or None if there is no such file. Raises `InputError` if it is damaged."""
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"not valid JSON: {error}", where=str(file)) from None


def _from_vocabulary(folder: Path) -> Tokenizer:
    """Create a tokenizer from a folder's vocab.txt, which is BERT's older format."""
    options = _read_json(folder / "tokenizer_config.json")
    options = options if isinstance(options, dict) else {}
    vocabulary = (folder / _VOCABULARY).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({token: id for id, token in enumerate(vocabulary)}, unk_token="[UNK]")
    )
    strip_accents = options.get("strip_accents")
    backend.normalizer = tokenizers.normalizers.BertNormalizer(
        lowercase=bool(options.get("do_lower_case", True)),
        strip_accents=None if strip_accents is None else bool(strip_accents),
        handle_chinese_chars=bool(options.get("tokenize_chinese_chars", True)),
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.decoder = tokenizers.decoders.WordPiece(prefix="##")
    return _with_special_tokens(backend, _BERT_TOKENS)


def _with_special_tokens(backend: tokenizers.Tokenizer, names: Sequence[str]) -> Tokenizer:
    """Mark the tokens with these names as special, except those that the vocabulary does not contain."""
    present = [name for name in names if backend.token_to_id(name) is not None]
    backend.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in present])
    return Tokenizer(tokenizers.Tokenizer.from_str(backend.to_str()))


def compare_with_transformers(folder: Path, network: Model, tokenizer: Tokenizer) -> tuple[float, int, str] | str:
    """Return the largest difference between the outputs, the number of compared tokens, and the name of the reference.

    If transformers cannot load the folder, return the reason as a string instead.
    """
    if not list(folder.glob("*.safetensors")):
        return "transformers cannot read this format"
    try:
        import transformers
    except ImportError:
        return 'transformers is not installed (pip install "tinylm[hf]")'
    with huggingface.quiet(transformers):
        try:
            reference = _load(transformers, folder, network)
        except Exception as error:  # the import also works without a reference; the caller reports the reason as a warning
            return f"transformers cannot load it: {' '.join(str(error).split())[:200]}"
        difference, tokens = _largest_difference(network, reference, tokenizer, verify.english_text())
    return difference, tokens, f"transformers {transformers.__version__}"


def differently_tokenized_text(folder: Path, tokenizer: Tokenizer) -> str | None:
    """Return a text for which transformers' tokenizer for the folder returns different ids.

    Returns None if there is no such text, if the folder contains a tokenizer.json, which tinylm and transformers both read, or if
    transformers is not installed or cannot load the tokenizer.
    """
    if (folder / "tokenizer.json").exists():
        return None
    try:
        import transformers
    except ImportError:
        return None
    with huggingface.quiet(transformers):
        try:
            reference = transformers.AutoTokenizer.from_pretrained(folder)
        except Exception:  # transformers raises many kinds of exceptions for a folder that it does not support
            return None
        for probe in _probes(verify.english_text()):
            if list(reference(probe, add_special_tokens=False)["input_ids"]) != tokenizer.encode(probe):
                return probe
    return None


def _probes(text: str) -> list[str]:
    """Return the texts on which to compare tokenizers, without those that spell a special token: transformers recognizes it."""
    return [probe for probe in verify.tokenizer_probes(text) if not any(name in probe for name in ("[", "</s>"))]


def _load(transformers: Any, folder: Path, network: Model) -> Any:
    if isinstance(network, SequenceClassifier):
        loader = transformers.AutoModelForSequenceClassification
    elif _has_mask_head(folder):
        loader = transformers.AutoModelForMaskedLM
    else:
        loader = transformers.AutoModel
    options = {"trust_remote_code": False, "use_safetensors": True, **huggingface.float32_argument(transformers)}
    return loader.from_pretrained(folder, **options).eval()


def _has_mask_head(folder: Path) -> bool:
    names = huggingface.read_config(folder).get("architectures") or [""]
    return str(names[0]).endswith(("ForMaskedLM", "ForPreTraining"))


@torch.no_grad()
def _largest_difference(network: Model, reference: Any, tokenizer: Tokenizer, text: str) -> tuple[float, int]:
    """Compare logits, or hidden states if the model has no head, on rows of real text. One row is padded."""
    framing = Framing.of(tokenizer, network.model)
    ids = np.array(tokenizer.encode(text), dtype=np.int64)
    length = min(framing.room, 254, len(ids))
    framed = [framing.frame(ids[start : start + length]) for start in range(0, min(len(ids), 8 * length), length)]
    framed.append(framing.frame(ids[: max(1, length // 3)]))
    tokens, segments = map(torch.from_numpy, framing.rows(framed))
    mask = segments >= 0
    output = reference(input_ids=tokens, attention_mask=mask.long())
    if isinstance(network, SequenceClassifier):
        ours, theirs = network(tokens, segments=segments), output.logits
    elif hasattr(output, "logits"):
        ours, theirs = network(tokens, segments=segments)[mask], output.logits[mask]
    else:
        ours, theirs = network.hidden(tokens, segments=segments)[mask], output.last_hidden_state[mask]
    columns = min(ours.shape[-1], theirs.shape[-1])
    difference = float((ours[..., :columns] - theirs[..., :columns]).abs().max())
    return (difference if difference == difference else float("inf")), int(mask.sum())


# Export.


def write(
    folder: Path, network: Model, objective: ObjectiveVariant, tokenizer: Tokenizer, card: str, type: str, *, has_head: bool
) -> None:
    """Write the files for transformers to an empty folder. `type` is a key of `huggingface.DTYPES`.

    Raises `InputError` if no transformers class supports the model.
    """
    model = network.model
    assert isinstance(model, EncoderSection)
    control = ControlTokens.of(tokenizer)
    config = encoders.make_config(network, objective, has_head)
    dtype = huggingface.DTYPES[type]
    tensors = {name: tensor.to(dtype) for name, tensor in encoders.export_tensors(network, has_head).items()}
    config |= {"torch_dtype": str(dtype).removeprefix("torch."), "pad_token_id": control.pad}
    write_json(folder / "config.json", config)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    write_json(folder / "tokenizer.json", _tokenizer_json(tokenizer, control))
    write_json(folder / "tokenizer_config.json", _tokenizer_config(tokenizer, control, model.context_length))
    (folder / "README.md").write_text(card, encoding="utf-8")


def write_sentence_settings(folder: Path, settings: SentenceSettings, width: int) -> None:
    """Write the files with which sentence-transformers computes the mean of the hidden states, which have this width.

    They use the names of earlier versions of sentence-transformers, which later versions also read.
    """
    modules = {"Transformer": "", "Pooling": "1_Pooling", **({"Normalize": "2_Normalize"} if settings.normalize else {})}
    for path in modules.values():
        (folder / path).mkdir(exist_ok=True)
    types = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{name}"}
        for number, (name, path) in enumerate(modules.items())
    ]
    write_json(folder / "modules.json", types)
    pooling = {"word_embedding_dimension": width, "pooling_mode_mean_tokens": True}
    write_json(folder / modules["Pooling"] / "config.json", pooling)
    limits = {"max_seq_length": settings.max_tokens, "do_lower_case": False, "model_args": _WITHOUT_POOLER}
    write_json(folder / "sentence_bert_config.json", limits)


def _tokenizer_json(tokenizer: Tokenizer, control: ControlTokens) -> dict[str, Any]:
    """Return a tokenizer.json that adds [CLS] and [SEP] to texts.

    As in `tinylm fill`, [MASK] includes a space before it if the tokenizer joins spaces to words. In transformers, it then includes
    all whitespace before it.
    """
    values: dict[str, Any] = json.loads(tokenizer.backend.to_str())
    names = {name: str(tokenizer.backend.id_to_token(id)) for name, id in (("cls", control.cls), ("sep", control.sep))}
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{names['cls']} $A {names['sep']}",
        pair=f"{names['cls']} $A {names['sep']} $B:1 {names['sep']}:1",
        special_tokens=[(names["cls"], control.cls), (names["sep"], control.sep)],
    )
    values["post_processor"] = json.loads(backend.to_str())["post_processor"]
    for token in values["added_tokens"]:
        if token["id"] == control.mask:
            token["lstrip"] = joins_spaces(tokenizer)
    return values


def _tokenizer_config(tokenizer: Tokenizer, control: ControlTokens, context_length: int) -> dict[str, Any]:
    special = {"cls_token": control.cls, "sep_token": control.sep, "mask_token": control.mask, "pad_token": control.pad}
    special["unk_token"] = control.pad if tokenizer.unknown is None else tokenizer.unknown
    mask = str(tokenizer.backend.id_to_token(control.mask))
    flags = {"lstrip": joins_spaces(tokenizer), "rstrip": False, "normalized": False, "single_word": False, "special": True}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: tokenizer.backend.id_to_token(id) for name, id in special.items()},
        "mask_token": {"__type": "AddedToken", "content": mask, **flags},
        "model_max_length": context_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }


def check_export(folder: Path, network: Model, tokenizer: Tokenizer, text: str, *, has_head: bool) -> tuple[float, int]:
    """Load the folder with transformers and compare it with `network`.

    Returns the largest difference on `text` between logits, or hidden states without a head, and the number of compared tokens.
    Raises `WorkError` if these, the token ids or the answers of the head's pipeline differ, and `InputError` if transformers is
    missing.
    """
    transformers = verify.require("transformers", "hf", "checking a Hugging Face folder")
    with huggingface.quiet(transformers):
        try:
            other_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            reference = _load(transformers, folder, network)
        except Exception as error:  # any exception means that the export is unusable
            raise WorkError(f"transformers cannot load the exported folder: {' '.join(str(error).split())[:300]}") from error
        control = ControlTokens.of(tokenizer)
        for probe in _probes(text):
            if list(other_tokenizer(probe)["input_ids"]) != [control.cls, *tokenizer.encode(probe), control.sep]:
                raise WorkError(
                    f"the exported tokenizer tokenizes {probe[:60]!r} differently from the tinylm tokenizer",
                    hint="nothing was saved",
                )
        difference, tokens = _largest_difference(network, reference, tokenizer, text)
        verify.check_logits(difference, "the exported folder")
        if has_head:
            _check_pipeline(transformers, folder, reference, other_tokenizer, network, tokenizer, text)
    return difference, tokens


def _check_pipeline(
    transformers: Any, folder: Path, reference: Any, other_tokenizer: Any, network: Model, tokenizer: Tokenizer, text: str
) -> None:
    """Raise `WorkError` if the transformers pipeline for this kind of model returns a different answer for the start of `text`."""
    words = " ".join(text.split()[:8]) or "a text"
    if isinstance(network, SequenceClassifier):
        pipeline = transformers.pipeline("text-classification", model=reference, tokenizer=other_tokenizer, device="cpu")
        theirs = pipeline(words, truncation=True)[0]
        framing = Framing.of(tokenizer, network.model)
        with torch.no_grad():
            row = torch.from_numpy(framing.frame(tokenizer.encode(words)))[None]
            probabilities = network(row).softmax(-1)[0]
        best = int(probabilities.argmax())
        objective = network.objective
        same = (theirs["label"], round(theirs["score"], 3)) == (objective.labels[best], round(float(probabilities[best]), 3))
        answer = f"{theirs['label']} {theirs['score']:.4f}"
    else:
        pipeline = transformers.pipeline("fill-mask", model=reference, tokenizer=other_tokenizer, device="cpu")
        mask = str(tokenizer.backend.id_to_token(ControlTokens.of(tokenizer).mask))
        short = words.split()[:3]
        theirs = pipeline(" ".join([*short[:1], mask, *short[1:]]), top_k=1)[0]
        ours = fill(network, tokenizer, " ".join([*short[:1], "[MASK]", *short[1:]]), top=1).masks[0].candidates[0]
        same = abs(theirs["score"] - ours.probability) < 1e-3
        answer = f"{theirs['token_str']!r} {theirs['score']:.4f}"
    if not same:
        raise WorkError(
            f"the transformers pipeline returns a different answer for the exported folder: {answer}", hint="nothing was saved"
        )


_PIPELINES = {
    "BertForMaskedLM": ("fill-mask", "a [MASK]"),
    "BertForSequenceClassification": ("text-classification", "a text"),
    "BertModel": ("feature-extraction", "a text"),
}
"""The pipeline for each transformers class, and an example of its input."""
_WITHOUT_POOLER = {"add_pooling_layer": False}
"""The argument that BertModel needs, because exports have no weights for its pooler."""


def model_card(name: str, parameters: int, class_name: str, recipe_yaml: str) -> str:
    """Return the text of README.md. `class_name` is the transformers class that loads the folder."""
    task, example = _PIPELINES[class_name]
    tags, options, more = "- tinylm\n", "", ""
    compared = "logits and the answer of the pipeline below"
    if class_name == "BertModel":
        tags, options, compared = f"{tags}- sentence-transformers\n", f", model_kwargs={_WITHOUT_POOLER}", "hidden states"
        more = (
            "The pipeline returns the hidden states of all tokens. sentence-transformers computes one vector for each text:\n\n"
            "```python\nfrom sentence_transformers import SentenceTransformer\n\n"
            f"print(SentenceTransformer({name!r}).encode([{example!r}]))\n```\n\n"
        )
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: {task}\ntags:\n{tags}---\n# {name}\n\n"
        f"A model with {parameters:,} parameters, exported with tinylm for `{class_name}`. After the export, the model was loaded "
        f"from this folder. Its {compared} matched those of the original model.\n\n"
        f"## Usage\n\n```python\nfrom transformers import pipeline\n\n"
        f"print(pipeline({task!r}, model={name!r}{options})({example!r}))\n```\n\n{more}"
        f"## Recipe\n\n```yaml\n{recipe_yaml}```\n"
    )
