"""What `tinylm embed` answers: nearest, analogy, similarity, odd-one-out, and how vectors do on public tasks (eval)."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table

from tinylm.errors import InputError, did_you_mean

from .console import JSON, QUIET, checked_text, out, print_json, show_facts, stderr, stdout, things

if TYPE_CHECKING:
    from tinylm.embedding.vectors import Neighbour, Vectors

FOLDER = Path("embeddings")
VECTORS = typer.Option(
    None, "--vectors", "-v", metavar="PATH", help="A folder that `embed train` made, or a file of any format; default: the newest."
)
COUNT = typer.Option(10, "-n", min=1, help="How many neighbours.")
METHOD = typer.Option("3cosadd", "--method", help="3cosadd or 3cosmul.")
MOST = typer.Option(30_000, "--most", min=0, help="Answer from the first so many names, the most frequent; 0: from all.")


def opened(path: str | None, quiet: bool = False) -> Vectors:
    """The vectors that --vectors names, else TINYLM_VECTORS, else the newest under embeddings/, which is then said."""
    from tinylm.embedding.formats import read
    from tinylm.run import VECTORS_FILE

    if path is not None:
        return read(Path(path))
    if named := os.environ.get("TINYLM_VECTORS"):
        return read(Path(named))
    found = sorted(FOLDER.glob(f"*/{VECTORS_FILE}"), key=lambda file: file.stat().st_mtime)
    if not found:
        hint = "`tinylm embed train SOURCE` makes some, --vectors names others"
        raise InputError(f"no vectors under {FOLDER}/ yet", hint=hint)
    if not quiet:
        stderr().say(f"using {found[-1].parent}", "dim")
    return read(found[-1])


def _questions(words: list[str] | None, needed: int | None, what: str) -> Iterator[list[str]]:
    """The question on the command line, or one per line of standard input when that is `-` or nothing."""
    if words and words != ["-"]:
        yield _checked([checked_text(word, "WORD") for word in words], needed, what, "the command line")
        return
    for number, line in enumerate(sys.stdin, 1):
        if parts := (line.strip("\n\r").split("\t") if "\t" in line else line.split()):
            yield _checked(parts, needed, what, f"-:{number}")


def _checked(words: list[str], needed: int | None, what: str, where: str) -> list[str]:
    if needed is not None and len(words) != needed:
        raise InputError(f"{what}, not {len(words)}", where=where)
    return words


def _answer(
    words: list[str] | None,
    needed: int | None,
    what: str,
    json: bool,
    ask: Callable[[list[str]], dict[str, Any]],
    show: Callable[[dict[str, Any]], None],
) -> None:
    """Answer each question; as JSON one object, or a list of them for questions from standard input."""
    several = not words or words == ["-"]
    answers = []
    for question in _questions(words, needed, what):
        answers.append(ask(question))
        if not json:
            show(answers[-1])
    if several and not answers:
        raise InputError("nothing was asked", where="-", hint="a question per line on standard input")
    if json:
        print_json(answers if several else answers[0])


def _show_neighbours(answer: dict[str, Any]) -> None:
    table = Table(title=answer["query"] if isinstance(answer["query"], str) else " ".join(answer["query"]), title_justify="left")
    table.add_column("token")
    table.add_column("similarity", justify="right")
    for neighbour in answer["neighbours"]:
        table.add_row(_printable(neighbour["token"]), f"{neighbour['similarity']:.4f}")
    stdout().print(table)


def _printable(token: str) -> str:
    """Tokens with white space at an end, or none but it, in quotes."""
    return token if token and token.strip() == token and token.isprintable() else repr(token)


def _listed(neighbours: Sequence[Neighbour]) -> list[dict[str, Any]]:
    return [asdict(neighbour) for neighbour in neighbours]


def nearest(
    word: list[str] | None = typer.Argument(None, help="One word; none or -: a word per line of standard input."),
    vectors: str | None = VECTORS,
    n: int = COUNT,
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """The words most similar to a word, by cosine."""
    loaded = opened(vectors, quiet)
    several = [" ".join(word)] if word else None
    _answer(
        several,
        1,
        "nearest takes one word",
        json,
        lambda words: {"query": words[0], "neighbours": _listed(loaded.nearest(words[0], n))},
        _show_neighbours,
    )


def analogy(
    words: list[str] | None = typer.Argument(None, metavar="A B C", help="What is to C as B is to A? None or -: a line each."),
    vectors: str | None = VECTORS,
    method: str = METHOD,
    n: int = COUNT,
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Answer `A is to B as C is to ...`; the three are left out of the answer."""
    _known_method(method)
    loaded = opened(vectors, quiet)
    _answer(
        words,
        3,
        "an analogy takes three words",
        json,
        lambda words: {
            "query": words,
            "method": method,
            "neighbours": _listed(loaded.analogy(words[0], words[1], words[2], n, method)),
        },
        _show_neighbours,
    )


def _known_method(method: str) -> None:
    from tinylm.embedding.vectors import METHODS

    if method not in METHODS:
        hint = did_you_mean(method, METHODS)
        raise InputError(f"must be {' or '.join(METHODS)}, not {method!r}", where="--method", hint=hint)


def similarity(
    words: list[str] | None = typer.Argument(None, metavar="A B", help="Two words; none or -: a pair per line of standard input."),
    vectors: str | None = VECTORS,
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """The cosine between two words, from -1 to 1."""
    loaded = opened(vectors, quiet)
    _answer(
        words,
        2,
        "similarity takes two words",
        json,
        lambda words: {"query": words, "similarity": loaded.similarity(*words)},
        lambda answer: out(f"{answer['similarity']:.4f}"),
    )


def odd_one_out(
    words: list[str] | None = typer.Argument(None, help="Three words or more; none or -: a set per line of standard input."),
    vectors: str | None = VECTORS,
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """The word least similar to the mean of all."""
    loaded = opened(vectors, quiet)

    def ask(words: list[str]) -> dict[str, Any]:
        ranked = loaded.odd_one_out(words)
        return {"query": words, "odd": ranked[0].token, "similarities": _listed(ranked)}

    _answer(words, None, "", json, ask, lambda answer: out(answer["odd"]))


def evaluate(
    file: list[str] = typer.Argument(..., help="Analogies (questions-words.txt) or word similarities (wordsim353.tsv)."),
    vectors: str | None = VECTORS,
    method: str = METHOD,
    most: int = MOST,
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Judge vectors by public tests, with how much of each they cover."""
    from tinylm.embedding.evaluate import Analogies
    from tinylm.embedding.evaluate import evaluate as judge

    _known_method(method)
    loaded = opened(vectors, quiet)
    results = [(name, judge(loaded, Path(name), method=method, most=most or None)) for name in file]
    documents = []
    for name, found in results:
        if isinstance(found, Analogies):
            sections = {section: {"correct": right, "covered": of} for section, (right, of) in found.sections.items()}
            numbers = {"correct": found.correct, "covered": found.covered, "total": found.total}
            shares = {"accuracy": found.accuracy, "coverage": found.coverage}
            documents.append({"file": name, "analogies": {**numbers, **shares, "sections": sections}})
        else:
            documents.append({"file": name, "similarity": {**asdict(found), "coverage": found.covered / found.pairs}})
    if json:
        print_json(documents[0] if len(documents) == 1 else documents)
        return
    for document in documents:
        show_facts(stdout(), _judgement(document))


def _judgement(document: dict[str, Any]) -> list[tuple[str, str]]:
    if "analogies" in document:
        found = document["analogies"]
        share = "none can be asked" if found["accuracy"] is None else f"{found['accuracy']:.1%} right"
        of = f"{found['correct']:,} of the {found['covered']:,} questions whose words are all known"
        rows = [("file", document["file"]), ("analogies", f"{share}, {of}")]
        rows.append(("coverage", f"{found['coverage']:.1%}: {found['covered']:,} of {found['total']:,}"))
        return rows + [(f"  {name}", f"{part['correct']:,} of {part['covered']:,}") for name, part in found["sections"].items()]
    found = document["similarity"]
    shown = ["undefined" if found[key] is None else f"{found[key]:.3f}" for key in ("spearman", "pearson")]
    return [
        ("file", document["file"]),
        ("similarity", f"Spearman {shown[0]}, Pearson {shown[1]}"),
        ("coverage", f"{found['coverage']:.1%}: {found['covered']:,} of {things(found['pairs'], 'pair')}"),
    ]
