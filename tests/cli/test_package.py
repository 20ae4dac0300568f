"""What ships: recipes that load, packages that are all listed, and commands in our own pages that can be typed."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import yaml
from tinylm_cli.app import _MODULES, VERBS
from tinylm_cli.recipe_files import shipped

from tinylm.recipe import load
from tinylm.run import Run

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "Makefile", *(f"recipes/{path.name}" for path in sorted(ROOT.glob("recipes/*.yaml"))))


@pytest.mark.parametrize("name", shipped())
def test_every_recipe_that_ships_loads(name: str, text_file: Path, tiny_run: Run) -> None:
    own_text = name == "quickstart"
    settings = [f"model.init_from={tiny_run.path}"] if name == "finetune" else []
    recipe = load(shipped()[name], settings if own_text else [f"data.train={text_file}", *settings])
    assert recipe.name == name
    again = recipe.to_yaml()
    assert yaml.safe_load(again)["name"] == name


def test_every_folder_of_code_is_packaged() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^packages = \[(.*?)^\]", text, flags=re.MULTILINE | re.DOTALL)
    assert block is not None
    listed = set(re.findall(r'"([\w.]+)"', block[1]))
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "tinylm").rglob("*.py")}
    assert listed == found | {"tinylm_cli", "tinylm_recipes"}


def commands(page: str) -> Iterator[str]:
    """The lines of a page that someone would paste into a shell; not those with a word to fill in, like RUN."""
    path = ROOT / page
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    text = re.sub(r"\$\(BIN\)/|\.venv/bin/", "", text).replace("$(DEMO_RUN)", "runs/quickstart")
    for line in text.splitlines():
        line = re.sub(r'^\s*@echo "(.*)"$', r"\1", line).replace('\\"', '"')
        found = re.match(r"^(?:    |\t|\$ |  |# |# [^`]*: )(tinylm [a-z].*)", line)
        if found and not re.search(r"[\[{]|\.\.\.|@@|\b[A-Z]+\b", found[1]):
            yield re.split(" [|>] ", found[1])[0]


LINES = sorted({(page, line) for page in PAGES for line in commands(page)})


@pytest.mark.parametrize(("page", "line"), LINES)
def test_the_commands_of_our_pages_parse(page: str, line: str) -> None:
    verb, *arguments = shlex.split(line, comments=True)[1:]
    assert verb in VERBS
    module = importlib.import_module(f"tinylm_cli.{_MODULES.get(verb, verb)}")
    command = typer.main.get_command(module.app)
    if hasattr(command, "commands"):
        command, arguments = command.commands[arguments[0]], arguments[1:]
    command.make_context(verb, arguments)


def test_the_pages_show_commands() -> None:
    assert {page for page, _ in LINES} >= {"Makefile", "recipes/docs-bpe.yaml"}
