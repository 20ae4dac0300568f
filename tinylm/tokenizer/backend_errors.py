"""Turns the errors of the `tokenizers` library into `InputError`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tinylm.errors import InputError


@contextmanager
def translate_backend_errors() -> Iterator[None]:
    """Raise `InputError` if `tokenizers` cannot process a text.

    It raises plain `Exception`, for example for a word outside a vocabulary without an unknown token. If the split pattern needs
    too many backtracking steps, it raises a `PanicException`, which is not a subclass of `Exception`.
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
