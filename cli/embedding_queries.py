"""The subcommands of `tinylm embed` that query vectors (nearest, analogy, similarity, odd-one-out) or evaluate them (eval)."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table

from tinylm.errors import InputError

from .console import (
    JSON,
    QUIET,
    checked_text,
    pluralize,
    print_columns,
    print_fields,
    print_json,
    stderr_console,
    stdout_console,
    write_stdout,
)

if TYPE_CHECKING:
    from tinylm.embedding.vectors import Neighbor, Vectors

FOLDER = Path("embeddings")
VECTORS = typer.Option(
    None,
    "--vectors",
    "-v",
    metavar="PATH",
    help="A folder written by `embed train`, or a vector file. Default: $TINYLM_VECTORS, or the newest folder in embeddings/.",
)
COUNT = typer.Option(10, "-n", min=1, help="Number of neighbors.")
METHOD = typer.Option("3cosadd", "--method", help="How to score answers: 3cosadd or 3cosmul.")
MAX_NAMES = typer.Option(
    30_000, "--max-names", min=0, help="Consider only the N most frequent words as answers. 0 means no limit.", metavar="N"
)


def load_vectors(path: str | None, quiet: bool = False) -> Vectors:
    """Load the vectors at `path` or $TINYLM_VECTORS, or the newest in embeddings/. In the last case, print the path to stderr."""
    from tinylm.embedding.formats import read
    from tinylm.run import VECTORS_FILE

    if path is not None:
        return read(Path(path))
    if named := os.environ.get("TINYLM_VECTORS"):
        return read(Path(named))
    files = sorted(FOLDER.glob(f"*/{VECTORS_FILE}"), key=lambda file: file.stat().st_mtime)
    if not files:
        hint = "train some with `tinylm embed train SOURCE`, or pass a path with --vectors"
        raise InputError(f"there are no vectors under {FOLDER}/", hint=hint)
    if not quiet:
        stderr_console().print_line(f"using {files[-1].parent}", "dim")
    return read(files[-1])


def read_texts(sources: Sequence[str], field: str, template: str | None, errors: str) -> Iterator[str]:
    """Yield the texts in the sources: each record, and each line of a plain text file."""
    from tinylm.text.files import text_lines
    from tinylm.text.sources import Corpus

    with Corpus(list(sources), field=field, template=template, errors=errors) as corpus:
        for _, is_record, document in corpus.documents():
            yield from [document] if is_record else text_lines(document)


@dataclass(frozen=True)
class _QueryCommand:
    """A subcommand that answers queries of one or more words."""

    name: str
    word_count: int | None
    """Number of words in a query. None means any number."""
    whole_lines: bool = False
    """Whether a query from standard input is a whole line."""

    def check(self, words: list[str], where: str | None) -> list[str]:
        if self.word_count is not None and len(words) != self.word_count:
            needed = {1: "one word", 2: "two words", 3: "three words"}[self.word_count]
            raise InputError(f"{self.name} requires {needed}, not {len(words)}", where=where)
        return words

    def queries(self, arguments: list[str] | None) -> Iterator[list[str]]:
        """Yield the query on the command line. If there is none, or it is `-`, yield one query per line of standard input."""
        if arguments and arguments != ["-"]:
            yield self.check([checked_text(word, "WORD") for word in arguments], None)
            return
        for number, line in enumerate(sys.stdin, 1):
            if self.whole_lines:
                if line.strip():
                    yield [line.strip("\n\r")]
            elif words := (line.strip("\n\r").split("\t") if "\t" in line else line.split()):
                yield self.check(words, f"-:{number}")


def _answer_queries(
    command: _QueryCommand,
    arguments: list[str] | None,
    json: bool,
    answer: Callable[[list[str]], dict[str, Any]],
    show: Callable[[dict[str, Any], bool], None],
) -> None:
    """Answer each query. JSON output is one object, or a list of objects if the queries come from standard input."""
    from_stdin = not arguments or arguments == ["-"]
    answers = []
    for query in command.queries(arguments):
        answers.append(answer(query))
        if not json:
            show(answers[-1], from_stdin)
    if from_stdin and not answers:
        raise InputError("standard input contains no queries", where="-", hint="write one query per line")
    if json:
        print_json(answers if from_stdin else answers[0])


def _show_neighbors(answer: dict[str, Any], show_query: bool) -> None:
    """Print a table on a terminal and plain columns otherwise. With `show_query`, the first column is the query."""
    query = answer["query"] if isinstance(answer["query"], str) else " ".join(answer["query"])
    rows = [(_quoted_if_unclear(neighbor["token"]), f"{neighbor['similarity']:.4f}") for neighbor in answer["neighbours"]]
    console = stdout_console()
    if not console.is_terminal:
        print_columns((query, *row) if show_query else row for row in rows)
        return
    table = Table(title=query, title_justify="left")
    table.add_column("token")
    table.add_column("similarity", justify="right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _quoted_if_unclear(token: str) -> str:
    """Return the token, in quotes if it is empty, starts or ends with whitespace, or is not printable."""
    return token if token and token.strip() == token and token.isprintable() else repr(token)


def _neighbor_dicts(neighbors: Sequence[Neighbor]) -> list[dict[str, Any]]:
    return [asdict(neighbor) for neighbor in neighbors]


def nearest(
    word: list[str] | None = typer.Argument(None, help="One word. If omitted or -, read one word per line from standard input."),
    vectors: str | None = VECTORS,
    n: int = COUNT,
    run: str | None = typer.Option(
        None, "--run", "-r", help="For sentence vectors: the run that computed the vectors, if the run has been moved."
    ),
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Print the words most similar to a word, or the lines most similar to a sentence, by cosine similarity.

    For vectors from `embed from-run --which sentence`, the sentence can be any text. The run that computed the vectors encodes it.
    """
    loaded = load_vectors(vectors, quiet)
    are_sentence_vectors = loaded.notes.get("which") == "sentence"
    if run is not None and not are_sentence_vectors:
        raise InputError("requires sentence vectors", where="--run")

    def neighbors(query: str) -> list[Neighbor]:
        if not are_sentence_vectors or query in loaded.index:
            return loaded.nearest(query, n)
        from tinylm.embedding.sentences import query_vector

        return loaded.nearest_to(query_vector(loaded, query, run), n)

    _answer_queries(
        _QueryCommand("nearest", 1, whole_lines=are_sentence_vectors),
        [" ".join(word)] if word else None,
        json,
        lambda words: {"query": words[0], "neighbours": _neighbor_dicts(neighbors(words[0]))},
        _show_neighbors,
    )


def analogy(
    words: list[str] | None = typer.Argument(
        None, metavar="A B C", help="Three words. If omitted or -, read three words per line from standard input."
    ),
    vectors: str | None = VECTORS,
    method: str = METHOD,
    n: int = COUNT,
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Complete the analogy "A is to B as C is to ...". The three words are not considered as answers."""
    from tinylm.embedding.vectors import check_analogy_method

    check_analogy_method(method)
    loaded = load_vectors(vectors, quiet)
    _answer_queries(
        _QueryCommand("analogy", 3),
        words,
        json,
        lambda words: {
            "query": words,
            "method": method,
            "neighbours": _neighbor_dicts(loaded.analogy(words[0], words[1], words[2], n, method)),
        },
        _show_neighbors,
    )


def similarity(
    words: list[str] | None = typer.Argument(
        None, metavar="A B", help="Two words. If omitted or -, read two words per line from standard input."
    ),
    vectors: str | None = VECTORS,
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Print the cosine similarity of two words, from -1 to 1."""
    loaded = load_vectors(vectors, quiet)
    _answer_queries(
        _QueryCommand("similarity", 2),
        words,
        json,
        lambda words: {"query": words, "similarity": loaded.similarity(*words)},
        lambda answer, _: write_stdout(f"{answer['similarity']:.4f}"),
    )


def odd_one_out(
    words: list[str] | None = typer.Argument(
        None, help="Three or more words. If omitted or -, read one set of words per line from standard input."
    ),
    vectors: str | None = VECTORS,
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Print the word that is least similar to the mean of the given words."""
    loaded = load_vectors(vectors, quiet)

    def answer(words: list[str]) -> dict[str, Any]:
        ranked = loaded.odd_one_out(words)
        return {"query": words, "odd": ranked[0].token, "similarities": _neighbor_dicts(ranked)}

    _answer_queries(_QueryCommand("odd-one-out", None), words, json, answer, lambda result, _: write_stdout(result["odd"]))


def evaluate(
    file: list[str] = typer.Argument(
        ..., help="Test sets: analogies (such as questions-words.txt) or word similarities (such as wordsim353.tsv)."
    ),
    vectors: str | None = VECTORS,
    method: str = METHOD,
    max_names: int = MAX_NAMES,
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Evaluate vectors on public test sets for analogies and word similarity."""
    from tinylm.embedding import evaluate as evaluation
    from tinylm.embedding.vectors import check_analogy_method

    check_analogy_method(method)
    loaded = load_vectors(vectors, quiet)
    results = [(name, evaluation.evaluate(loaded, Path(name), method=method, max_names=max_names or None)) for name in file]
    documents = []
    for name, result in results:
        if isinstance(result, evaluation.AnalogyResult):
            sections = {
                section: {"correct": correct, "covered": covered} for section, (correct, covered) in result.sections.items()
            }
            counts = {"correct": result.correct, "covered": result.covered, "total": result.total}
            shares = {"accuracy": result.accuracy, "coverage": result.coverage}
            documents.append({"file": name, "analogies": {**counts, **shares, "sections": sections}})
        else:
            documents.append({"file": name, "similarity": {**asdict(result), "coverage": result.covered / result.pairs}})
    if json:
        print_json(documents[0] if len(documents) == 1 else documents)
        return
    for document in documents:
        print_fields(stdout_console(), _result_rows(document))


def _result_rows(document: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the result for one file as (label, value) pairs."""
    if "analogies" in document:
        result = document["analogies"]
        accuracy = "undefined, because no question is covered"
        if result["accuracy"] is not None:
            accuracy = f"{result['accuracy']:.1%}: {result['correct']:,} of {pluralize(result['covered'], 'covered question')}"
        return [
            ("file", document["file"]),
            ("accuracy", accuracy),
            ("coverage", f"{result['coverage']:.1%}: {result['covered']:,} of {pluralize(result['total'], 'question')}"),
            *((f"  {name}", f"{part['correct']:,} of {part['covered']:,}") for name, part in result["sections"].items()),
        ]
    result = document["similarity"]
    spearman, pearson = ("undefined" if result[key] is None else f"{result[key]:.3f}" for key in ("spearman", "pearson"))
    return [
        ("file", document["file"]),
        ("correlation", f"Spearman {spearman}, Pearson {pearson}"),
        ("coverage", f"{result['coverage']:.1%}: {result['covered']:,} of {pluralize(result['pairs'], 'pair')}"),
    ]
