"""Test packaging: shipped recipes load, every package is listed, and the commands in the documentation parse."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from tinylm_cli.app import COMMANDS, load_command

from tinylm.recipe import load
from tinylm.recipe.shipped import shipped_recipes
from tinylm.run import Run

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "Makefile", *(f"recipes/{path.name}" for path in sorted(ROOT.glob("recipes/*.yaml"))))


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_loads(name: str, text_file: Path, tiny_run: Run) -> None:
    has_text = name == "quickstart"
    settings = [f"model.init_from={tiny_run.path}"] if name in ("finetune", "chat") else []
    settings += ["model.init_from=null"] if name == "classify-docs" else []  # the recipe starts from an encoder run
    recipe = load(shipped_recipes()[name], settings if has_text else [f"data.train={text_file}", *settings])
    assert recipe.name == name
    assert yaml.safe_load(recipe.to_yaml())["name"] == name


def test_every_package_is_listed_in_pyproject() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^packages = \[(.*?)^\]", text, flags=re.MULTILINE | re.DOTALL)
    assert block is not None
    listed = set(re.findall(r'"([\w.]+)"', block[1]))
    packages = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "tinylm").rglob("*.py")}
    assert listed == packages | {"tinylm_cli", "tinylm_recipes"}


def commands(page: str) -> Iterator[str]:
    """Yield the tinylm commands in a page, except those with a placeholder such as RUN."""
    path = ROOT / page
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    text = re.sub(r"\$\(BIN\)/|\.venv/bin/", "", text).replace("$(DEMO_RUN)", "runs/quickstart")
    for line in text.splitlines():
        line = re.sub(r'^\s*@echo "(.*)"$', r"\1", line).replace('\\"', '"')
        match = re.match(r"^(?:    |\t|\$ |  |# |# [^`]*: )(tinylm [a-z].*)", line)
        if match and not re.search(r"[\[{]|\.\.\.|@@|\b[A-Z]+\b", match[1]):
            yield re.split(" [|<>] ", match[1])[0]


LINES = sorted({(page, line) for page in PAGES for line in commands(page)})


@pytest.mark.parametrize(("page", "line"), LINES)
def test_the_commands_in_the_documentation_parse(page: str, line: str) -> None:
    name, *arguments = shlex.split(line, comments=True)[1:]
    assert name in COMMANDS
    command = load_command(name)
    if hasattr(command, "commands"):
        command, arguments = command.commands[arguments[0]], arguments[1:]
    command.make_context(name, arguments)


def test_commands_are_found_in_the_documentation() -> None:
    assert {page for page, _ in LINES} >= {"Makefile", "recipes/docs-bpe.yaml"}
