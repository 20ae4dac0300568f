"""`tinylm`: the verbs, loaded only when used, and the one place where errors become messages and exit codes."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

import tinylm
from tinylm.errors import TinylmError

VERBS = {
    "train": ("Train", "Train a model from a recipe."),
    "plan": ("Train", "What a recipe will cost: parameters, memory, time."),
    "recipes": ("Train", "The recipes that ship with tinylm."),
    "sample": ("Use", "Write text with a trained model."),
    "eval": ("Use", "Measure a model on a text: perplexity, bits per byte."),
    "runs": ("Use", "The runs here, with their numbers."),
    "plot": ("Use", "Loss curves of runs as a picture."),
    "tokenize": ("Text", "Train, apply and judge tokenizers."),
}
_MODULES = {"eval": "evaluate"}


class LazyVerbs(TyperGroup):
    """Knows the verbs' names and one line of help each; imports a verb's module only to run it."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in VERBS:
            return None
        panel, line = VERBS[cmd_name]
        return TyperCommand(cmd_name, help=line, short_help=line, rich_help_panel=panel)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        if name in VERBS:
            module = importlib.import_module(f".{_MODULES.get(name, name)}", __package__)
            command = typer.main.get_command(module.app)
            command.name = name
        return name, command, rest


app = typer.Typer(
    cls=LazyVerbs,
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"tinylm {tinylm.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version and exit."),
) -> None:
    """Turn any text into a small language model whose every number can be trusted.

    Start with [bold]tinylm train quickstart[/bold].
    """


def main() -> None:
    """The console script. Exit codes: 0 done, 1 the work failed, 2 the input was wrong, 130/143 stopped by a signal."""
    try:
        app()
        sys.stdout.flush()
    except TinylmError as error:
        if os.environ.get("TINYLM_DEBUG") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except KeyboardInterrupt:
        print("stopped at once", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
