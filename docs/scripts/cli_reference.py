"""Generate docs/reference/cli.md from the Typer apps. The page documents every command with its arguments and options."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tinylm_cli.app import COMMANDS, load_command

INTRODUCTION = """\
# Command line

This page lists every command with its arguments and options. `tinylm COMMAND --help` shows the same information in the terminal,
and `tinylm --install-completion` sets up completion for your shell. `python docs/scripts/make_reference.py` generates this page.

Results go to standard output; notes and progress go to standard error. With `--json`, standard output is exactly one JSON
document. Exit codes: 0 for success, 1 if the command failed, 2 if its input was invalid, 130 or 143 if a signal stopped the command
after it saved its work.
"""


def commands() -> Iterator[tuple[str, Any]]:
    """Yield the full name of each command, such as `tokenize train`, and its Click command, in the order of `tinylm --help`."""
    for name in COMMANDS:
        command = load_command(name)
        children = getattr(command, "commands", None)
        if children is None:
            yield name, command
        else:
            for child_name, child in children.items():
                yield f"{name} {child_name}", child


def options_of(command: Any) -> set[str]:
    """Return all spellings of a command's options."""
    return {spelling for parameter in command.params for spelling in _spellings(parameter) if spelling.startswith("-")}


def _spellings(parameter: Any) -> list[str]:
    return [*parameter.opts, *parameter.secondary_opts]


def _escaped(text: str) -> str:
    """Return text on one line, with Markdown and HTML escaped for a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("[", "\\[").replace("<", "&lt;")


def _is_argument(parameter: Any) -> bool:
    return bool(parameter.param_type_name == "argument")


def _argument_name(parameter: Any) -> str:
    return str((parameter.metavar or parameter.name.upper()).strip("[]{}"))


def _default(parameter: Any) -> str:
    value = parameter.default
    if parameter.required:
        return "required"
    if value in (None, "", [], ()) or _is_argument(parameter) or callable(value):
        return ""
    if parameter.is_flag:
        return "on" if value else ""
    return f"`{value}`"


def _row(parameter: Any) -> str:
    if _is_argument(parameter):
        shown = f"`{_argument_name(parameter)}`"
    else:
        spellings = _spellings(parameter)
        if not parameter.is_flag:
            spellings[-1] += f" {parameter.metavar or parameter.name.strip('_').upper()}"
        shown = ", ".join(f"`{spelling}`" for spelling in spellings)
    return f"| {shown} | {_escaped(parameter.help or '')} | {_default(parameter)} |"


def _usage(name: str, command: Any) -> str:
    arguments = []
    for parameter in filter(_is_argument, command.params):
        shown = _argument_name(parameter)
        if parameter.nargs == -1 and not shown.endswith("..."):
            shown += "..."
        arguments.append(shown if parameter.required else f"[{shown}]")
    return " ".join([f"tinylm {name}", *arguments, "[OPTIONS]"])


def page() -> str:
    """Return the Markdown of docs/reference/cli.md."""
    lines = [INTRODUCTION]
    for name, command in commands():
        lines += [f"## tinylm {name}", "", _escaped(command.help or ""), "", "```text", _usage(name, command), "```", ""]
        rows = [_row(parameter) for parameter in command.params if parameter.name != "help"]
        if rows:
            lines += ["| argument or option | meaning | default |", "|---|---|---|", *rows, ""]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    print(page(), end="")
