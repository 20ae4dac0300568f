"""Run every command shown in the documentation and write its real output into the page.

    python docs/scripts/run_examples.py                  all pages, in the order of the site's navigation
    python docs/scripts/run_examples.py README.md ...    only these pages
    python docs/scripts/run_examples.py --check          run the commands but do not change the pages

In a fenced `console` block, commands begin with `$ ` and are followed by their output, including standard error. In a `bash` block,
every line is a command, and no output is shown. All pages share one working folder (`--work`), so a page can use models that an
earlier page trained. Comments directly above a block change how it is handled:

    <!-- not run: REASON -->      the block is not run or changed
    <!-- lines: 1-4,9,~2 -->      only these lines of each output are shown (`~2`: the last two); `...` replaces the others
    <!-- run with: OLD => NEW --> OLD is replaced with NEW in the command that runs, for example to train for a shorter time
    <!-- exit: 2 -->              the last command of the block must exit with this code instead of 0
    <!-- setup: COMMAND -->       this command runs before the block and is not shown; `$TINYLM_SOURCE` is the repository
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
_COMMENT = re.compile(r"^<!-- (not run|run with|lines|exit|setup): (.*) -->$")
_TIMEOUT = 1800


@dataclass
class Block:
    """A fenced block in a page. `first` and `last` are the line indices of its fences."""

    kind: str
    first: int
    last: int
    lines: list[str]
    comments: dict[str, str] = field(default_factory=dict)
    setup: list[str] = field(default_factory=list)

    @property
    def commands(self) -> list[str]:
        """The commands in a console or bash block. A command that ends with a backslash continues on the next line."""
        if self.kind == "bash":
            return [line for line in self.lines if line.strip()]
        joined = "\n".join(self.lines).replace("\\\n", "\0")
        return [line[2:].replace("\0", "\\\n") for line in joined.splitlines() if line.startswith("$ ")]


def blocks(text: str) -> Iterator[Block]:
    """Yield the fenced blocks of a Markdown page, each with the comments directly above it."""
    lines = text.splitlines()
    comments: dict[str, str] = {}
    setup: list[str] = []
    index = 0
    while index < len(lines):
        line = lines[index].strip()
        if match := _COMMENT.match(line):
            if match[1] == "setup":
                setup.append(match[2])
            else:
                comments[match[1]] = match[2]
        elif line.startswith("```") and len(line) > 3:
            last = next(number for number in range(index + 1, len(lines)) if lines[number].strip() == "```")
            yield Block(line[3:].split()[0], index, last, lines[index + 1 : last], comments, setup)
            comments, setup, index = {}, [], last
        elif line:
            comments = {}
        index += 1


def pages() -> list[Path]:
    """Return README.md and the site's pages, in navigation order."""
    navigation = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader=_Loader)["nav"]

    def flattened(entry: object) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for part in entry if isinstance(entry, list) else entry.values():  # type: ignore[attr-defined]
                yield from flattened(part)

    return [ROOT / "README.md", *(ROOT / "docs" / name for name in flattened(navigation))]


class _Loader(yaml.SafeLoader):
    """A YAML loader for mkdocs.yml that reads `!!python/name:` tags as strings."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)


class Shell:
    """A bash process that runs all commands of a page, so that variables and background jobs persist between blocks."""

    def __init__(self, folder: Path) -> None:
        bin_folder = Path(sys.executable).parent
        environment = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}", "NO_COLOR": "1", "COLUMNS": "100"}
        environment["TINYLM_SOURCE"] = str(ROOT)
        self._bash = subprocess.Popen(
            ["bash"], cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def run(self, command: str) -> tuple[int, str]:
        """Run a command and return its exit code and output, including standard error."""
        assert self._bash.stdin is not None
        assert self._bash.stdout is not None
        self._bash.stdin.write(f"{command}\nprintf '\\n@@%s@@\\n' $?\n".encode())
        self._bash.stdin.flush()
        output = b""
        while not (end := re.search(rb"\n@@(\d+)@@\n$", output)):
            line = self._bash.stdout.readline()
            if not line:
                raise SystemExit(f"{command}: the shell exited unexpectedly")
            output += line
        return int(end[1]), output[: end.start()].decode("utf-8", "replace")

    def close(self) -> None:
        assert self._bash.stdin is not None
        self._bash.stdin.write(b"kill $(jobs -p) 2>/dev/null\n")
        self._bash.stdin.close()
        self._bash.wait(_TIMEOUT)


def selected(output: str, ranges: str | None) -> list[str]:
    """Return the output lines in `ranges`, such as `1-4,9,~2`, with `...` in place of each gap."""
    lines = [line.rstrip() for line in output.rstrip("\n").splitlines()]
    if ranges is None:
        return lines
    kept: list[str] = []
    previous = 0
    for part in ranges.replace(" ", "").split(","):
        if part.startswith("~"):
            first, last = max(previous + 1, len(lines) - int(part[1:]) + 1), len(lines)
        else:
            start, _, end = part.partition("-")
            first, last = int(start), int(end or start)
        if first > previous + 1:
            kept.append("...")
        kept += lines[first - 1 : last]
        previous = last
    return [*kept, "..."] if previous < len(lines) else kept


def refresh(page: Path, folder: Path, *, check: bool) -> list[str]:
    """Run the commands of a page and update their output unless `check` is set. Return a message for each unexpected exit code."""
    text = page.read_text(encoding="utf-8")
    lines, failures = text.splitlines(), []
    shell = Shell(folder)
    replacements = []
    for block in blocks(text):
        for command in block.setup:
            code, output = shell.run(command)
            if code:
                failures.append(f"{page.name}: setup {command}: exit code {code}\n{output}")
        if block.kind not in ("console", "bash") or "not run" in block.comments:
            continue
        old, _, new = block.comments.get("run with", "").partition(" => ")
        shown: list[str] = []
        for number, command in enumerate(block.commands, 1):
            print(f"{page.name}: {command}", file=sys.stderr, flush=True)
            code, output = shell.run(command.replace(old, new) if old else command)
            expected = int(block.comments.get("exit", 0)) if number == len(block.commands) else 0
            if code != expected:
                failures.append(f"{page.name}: {command}: exit code {code} instead of {expected}\n{output}")
            shown += [*f"$ {command}".splitlines(), *selected(output, block.comments.get("lines"))]
        if block.kind == "console":
            replacements.append((block, shown))
    shell.close()
    if not check:
        for block, shown in reversed(replacements):
            indent = lines[block.first][: len(lines[block.first]) - len(lines[block.first].lstrip())]
            lines[block.first + 1 : block.last] = [indent + line if line else line for line in shown]
        page.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=Path, help="default: README.md and all pages of the site")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "examples", help="folder in which the commands run")
    parser.add_argument("--check", action="store_true", help="run the commands but do not change the pages")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    failures: list[str] = []
    for page in arguments.pages or pages():
        failures += refresh(page.resolve(), arguments.work, check=arguments.check)
    print("\n".join(failures), file=sys.stderr)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
