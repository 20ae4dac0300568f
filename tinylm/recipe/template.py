"""Parse templates that combine a record's fields into a text, such as `{title}: {body}`."""

from __future__ import annotations

import re
from collections.abc import Iterator

_PART = re.compile(r"(?P<escaped>\{\{|\}\})|\{(?P<field>[^{}]*)\}|(?P<stray>[{}])")


def parse_template(template: str) -> Iterator[tuple[str, str | None]]:
    """Yield (literal text, field name) pairs. The last name is None. `{{` and `}}` are escaped braces.

    Everything between braces is a field name; format specifications are not supported. Raises `ValueError` for an unmatched brace
    or an empty field name.
    """
    literal, end = "", 0
    for match in _PART.finditer(template):
        literal += template[end : match.start()]
        end = match.end()
        if match["stray"]:
            raise ValueError(f"has an unmatched {match['stray']} (write {match['stray'] * 2} for a brace in the text)")
        if match["escaped"]:
            literal += match["escaped"][0]
        elif not match["field"]:
            raise ValueError("has a pair of braces without a field name (write {{}} for braces in the text)")
        else:
            yield literal, match["field"]
            literal = ""
    yield literal + template[end:], None


def template_problem(template: str) -> str | None:
    """Return what is wrong with a template, or None."""
    try:
        named = [name for _, name in parse_template(template) if name is not None]
    except ValueError as error:
        return f"{template!r} {error}"
    return None if named else f"{template!r} contains no field (write a field in braces, for example {{title}})"
