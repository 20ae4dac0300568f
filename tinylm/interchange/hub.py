"""Download a model from the Hugging Face Hub: `hf:OWNER/NAME` or `hf:OWNER/NAME@REVISION`."""

from __future__ import annotations

import os
from pathlib import Path

from tinylm.errors import InputError, WorkError
from tinylm.interchange import verify

PREFIX = "hf:"
_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json", "vocab.json", "merges.txt")
_PICKLES = ("pytorch_model.bin",)


def download(source: str, *, trust_pickle: bool = False) -> Path:
    """Download the files needed for an import to the Hub's cache. Returns the folder that contains them.

    `source` begins with `PREFIX`. The environment variables `HF_ENDPOINT` and `HF_TOKEN` are respected. Raises `InputError` if the
    name is invalid or the Hub has no such model. Raises `WorkError` if the Hub cannot be reached.
    """
    hub = verify.require("huggingface_hub", "hf", "downloading a model")
    errors = verify.require("huggingface_hub.errors", "hf", "downloading a model")
    name, _, revision = source.removeprefix(PREFIX).partition("@")
    try:
        folder = hub.snapshot_download(
            name,
            revision=revision or None,
            allow_patterns=[*_FILES, *(_PICKLES if trust_pickle else ())],
            endpoint=os.environ.get("HF_ENDPOINT"),
        )
    except errors.HFValidationError:
        raise InputError("expected hf:OWNER/NAME", where=source, hint="for example hf:EleutherAI/pythia-70m") from None
    except errors.RepositoryNotFoundError:
        raise InputError(
            "the Hub has no such public model", where=source, hint="for a private or gated model, log in with `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise InputError(f"the model has no revision {revision}", where=source) from None
    except Exception as error:  # the client raises exceptions from several network libraries
        message = " ".join(str(error).split())[:200]
        raise WorkError(f"cannot download {source}: {message}", hint="check the connection and try again") from None
    if not (Path(folder) / "config.json").exists():
        raise InputError("the repository has no config.json", where=source, hint="choose a transformers model")
    return Path(folder)
