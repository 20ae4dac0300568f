"""Convert errors from the `tokenizers` library to `InputError`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tinylm.errors import InputError


@contextmanager
def translate_backend_errors() -> Iterator[None]:
    """Raise `InputError` if `tokenizers` cannot process a text.

    The library raises a plain `Exception`, for example if a word is not in the vocabulary and there is no unknown token. It raises
    a `PanicException`, which is not a subclass of `Exception`, if the split pattern needs too many backtracking steps.
    """
    try:
        yield
    except BaseException as error:
        if type(error) is Exception:
            raise InputError(f"the tokenizer cannot encode this text: {_first_line(error)}") from None
        if type(error).__name__ == "PanicException":
            hint = "use a simpler split pattern, without nested repetitions"
            raise InputError(f"the tokenizer cannot encode this text: {_first_line(error)}", hint=hint) from None
        raise


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or "unknown error").splitlines()[0]
