"""Every command, option, recipe key, extra, file, link and Python name in the documentation exists.

`docs/scripts/run_examples.py` runs the commands and writes their output. These tests are fast because they only read the pages.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import shlex
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from keys import sections_in_field
from pydantic import BaseModel

from tinylm.errors import InputError
from tinylm.recipe.embeddings import EmbeddingRecipe
from tinylm.recipe.loader import loads_any
from tinylm.recipe.schema import Recipe

ROOT = Path(__file__).resolve().parent.parent
GENERATED = {"docs/reference/cli.md", "docs/reference/recipe.md"}
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md"))
    if str(path.relative_to(ROOT)) not in GENERATED and path.name != "CHANGELOG.md"
)
OTHER_OPTIONS = {"--nproc-per-node", "--strict", "-m", "-k", "-n0", "-n", "-c", "-e", "-q", "--help"}
"""Options of torchrun, pytest, pip, python and mkdocs that appear on the pages."""


@pytest.fixture(scope="module", autouse=True)
def _scripts() -> Iterator[None]:
    sys.path.insert(0, str(ROOT / "docs" / "scripts"))
    yield
    sys.path.remove(str(ROOT / "docs" / "scripts"))


@pytest.fixture(scope="module")
def examples(_scripts: None) -> ModuleType:
    return importlib.import_module("run_examples")


@pytest.fixture(scope="module")
def options(_scripts: None) -> dict[str, set[str]]:
    """Map the full name of each command, such as `tokenize train`, to its options."""
    reference = importlib.import_module("cli_reference")
    return {name: reference.options_of(command) for name, command in reference.commands()}


@pytest.fixture(scope="module")
def keys() -> set[str]:
    """Return the dotted path of every section and key in a recipe."""

    def walk(section: type[BaseModel], prefix: str) -> Iterator[str]:
        for key, field in section.model_fields.items():
            yield prefix + key
            for inner in sections_in_field(field):
                yield from walk(inner, f"{prefix}{key}.")

    return {*walk(Recipe, ""), *walk(EmbeddingRecipe, "")}


def _text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def _prose(text: str) -> str:
    """Return the text of a page without its fenced blocks and comments."""
    without_blocks = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"<!--.*?-->", "", without_blocks, flags=re.DOTALL)


def _commands(page: str, examples: ModuleType) -> Iterator[list[str]]:
    """Yield the words of every tinylm command in the fenced blocks of a page, without pipes and redirections."""
    for block in examples.blocks(_text(page)):
        commands = block.commands if block.kind in ("console", "bash") else []
        for line in commands:
            lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
            lexer.whitespace_split, lexer.commenters = True, "#"
            words: list[str] = []
            for word in [*lexer, ";"]:
                if not set(word) <= set("|&;<>"):
                    words.append(word)
                    continue
                if words[:1] == ["tinylm"]:
                    yield words[1:]
                elif "tinylm" in words and words[words.index("tinylm") - 1] == "-m":
                    yield words[words.index("tinylm") + 1 :]
                words = []


def _name(words: list[str], options: dict[str, set[str]]) -> str:
    """Return the full name of the command that starts with these words."""
    for length in (2, 1):
        if (name := " ".join(words[:length])) in options:
            return name
    raise AssertionError(f"no such command: tinylm {' '.join(words)}")


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_their_options_exist(page: str, examples: ModuleType, options: dict[str, set[str]], keys: set[str]) -> None:
    for words in _commands(page, examples):
        if words[0].startswith("-"):
            assert words[0] in ("--help", "--version", "--install-completion"), words
            continue
        name = _name(words, options)
        used = [word.split("=")[0] for word in words if re.match(r"--?[a-zA-Z]", word)]
        assert set(used) <= options[name], f"tinylm {name} has no {sorted(set(used) - options[name])}"
        for option, value in pairwise(words):
            if option in ("--set", "--allow-change"):
                assert value.split("=")[0] in keys, value
        if name in ("train", "plan") and len(words) > 1 and not words[1].startswith(("-", "runs/")):
            assert words[1].endswith(".yaml") or (ROOT / "recipes" / f"{words[1]}.yaml").exists(), words[1]


def _extras() -> set[str]:
    """Return the names of the optional dependency groups in pyproject.toml."""
    after_header = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[project.optional-dependencies]")[1]
    return set(re.findall(r"^(\w+) = \[", after_header.split("\n[")[0], re.MULTILINE))


@pytest.mark.parametrize("page", PAGES)
def test_names_in_inline_code_exist(page: str, options: dict[str, set[str]], keys: set[str]) -> None:
    known = set().union(*options.values()) | OTHER_OPTIONS
    commands = {name.split()[0] for name in options}
    extras = _extras()
    # Pages about benchmarks also contain options of the benchmark scripts.
    option = r"tinylm[\w ]* (--?[a-z][a-z-]*)" if "benchmarks/" in _text(page) else r"(?:tinylm[\w ]* |^)(--?[a-z][a-z-]*)"
    sections = {key for key in keys if any(other.startswith(f"{key}.") for other in keys)}
    for code in re.findall(r"`([^`\n]+)`", _prose(_text(page))):
        if match := re.match(r"tinylm ([a-z]+)", code):
            assert match[1] in commands, code
        if match := re.match(option, code):
            assert match[1] in known, code
        if match := re.fullmatch(r"tinylm\[(\w+)\]", code):
            assert match[1] in extras, code
        if (match := re.match(r"((?:[a-z_]+\.)+[a-z_]+)(?=$|[:=])", code)) and match[1].split(".")[0] in sections:
            assert match[1] in keys or match[1].endswith((".csv", ".json", ".jsonl", ".parquet", ".tsv", ".py", ".yaml")), code
        if re.fullmatch(r"(tinylm|cli|tests|recipes|docs|benchmarks)/[\w./-]+", code) and "NAME" not in code:
            assert (ROOT / code).exists(), code


@pytest.mark.parametrize("page", PAGES)
def test_linked_files_exist(page: str) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", _prose(_text(page))):
        if "://" not in target:
            assert ((ROOT / page).parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_recipes_can_be_loaded(page: str, examples: ModuleType) -> None:
    """Load each recipe on a page, after adding required keys to recipes that show only some sections.

    A recipe marked "wrong on purpose" must be rejected.
    """
    text = _text(page)
    for block in examples.blocks(text):
        if block.kind != "yaml":
            continue
        above = next((line for line in reversed(text.splitlines()[: block.first]) if line.strip()), "")
        recipe = "\n".join(block.lines) + "\n"
        for key, value in (("data", "{train: text.txt}"), ("training", "{steps: 1}")):
            if "kind: embeddings" not in recipe and not re.search(rf"^{key}:", recipe, re.MULTILINE):
                recipe += f"{key}: {value}\n"
        if "wrong on purpose" in above:
            with pytest.raises(InputError):
                loads_any(recipe, check_files=False)
        else:
            loads_any(recipe.replace("runs/quickstart", str(ROOT)) if "init_from" not in recipe else recipe, check_files=False)


@pytest.mark.parametrize("page", PAGES)
def test_python_examples_import_names_that_exist(page: str, examples: ModuleType) -> None:
    for block in examples.blocks(_text(page)):
        if block.kind != "python":
            continue
        for node in ast.walk(ast.parse("\n".join(block.lines))):
            if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.startswith("tinylm"):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module}.{alias.name}"


def _reference_names() -> set[str]:
    """Return the dotted names of everything that the Python reference documents."""
    names: set[str] = set()
    for name, options in re.findall(r"^::: (\S+)\n((?: .*\n)*)", _text("docs/reference/python.md"), re.MULTILINE):
        members = (yaml.safe_load(options) or {}).get("options", {}).get("members")
        names |= {name} if members is None else {f"{name}.{member}" for member in members}
    return names


def _names_used(code: str) -> Iterator[str]:
    """Yield the dotted names in tinylm that a program imports, or uses as attributes of a module that it imports."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.startswith("tinylm"):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if isinstance(pkgutil.resolve_name(name), ModuleType):
                    yield from (f"{name}.{attribute}" for attribute in re.findall(rf"\b{alias.name}\.(\w+)", code))
                else:
                    yield name


@pytest.mark.parametrize("page", ["docs/guides/python.md", "docs/reference/python.md"])
def test_every_python_name_in_an_example_is_in_the_reference(page: str, examples: ModuleType) -> None:
    documented = [pkgutil.resolve_name(name) for name in _reference_names()]
    code = "\n".join(line for block in examples.blocks(_text(page)) if block.kind == "python" for line in block.lines)
    used = set(_names_used(code))
    assert used
    assert [name for name in sorted(used) if not any(pkgutil.resolve_name(name) is known for known in documented)] == []


def test_every_command_block_is_run_or_states_why_it_is_not_run(examples: ModuleType) -> None:
    executed_pages = {path.resolve() for path in examples.pages()}
    for page in PAGES:
        for block in examples.blocks(_text(page)):
            if block.kind in ("console", "bash"):
                assert block.commands, f"{page}: a block without a command"
                reason = block.comments.get("not run")
                assert reason or (reason is None and ROOT / page in executed_pages), (
                    f"{page}: not run, and no reason is stated: {block.commands[0]}"
                )


def test_all_pages_are_in_the_site_navigation(examples: ModuleType) -> None:
    in_navigation = {path.resolve() for path in examples.pages()} - {ROOT / "README.md"}
    assert in_navigation == {path.resolve() for path in (ROOT / "docs").rglob("*.md")}
