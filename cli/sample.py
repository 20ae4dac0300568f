"""`tinylm sample`: write text with a trained model."""

from __future__ import annotations

import json as json_module
import math
import secrets
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tinylm.errors import InputError

from .console import (
    CHECKPOINT,
    COMPILE,
    DEVICE,
    JSON,
    QUIET,
    RUN,
    THREADS,
    WEIGHTS,
    ConsoleReporter,
    checked_text,
    checked_weights,
    count,
    given,
    open_run,
    out,
    print_json,
    stderr,
    things,
)

if TYPE_CHECKING:
    from tinylm.generation.constraint import Constraint
    from tinylm.generation.engine import Sample
    from tinylm.generation.search import Ranked
    from tinylm.tokenizer import Tokenizer

app = typer.Typer(add_completion=False)
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty", "seed")
UNSEARCHED = (*SAMPLING, "stop", "logit_bias", "ban", "force", "logprobs", "best_of", "rank")
"""What a beam search has no use for."""


@app.command()
def sample(
    ctx: typer.Context,
    prompt: str = typer.Option("", "--prompt", "-p", help="What the text begins with; empty: a new document; -: standard input."),
    prompt_file: Path | None = typer.Option(None, "--prompt-file", help="A file whose text, all of it, is the prompt."),
    prompts: str | None = typer.Option(
        None, "--prompts", help="Many prompts: a .jsonl file or -, a string or an object a line. Answers come as .jsonl."
    ),
    field: str = typer.Option("prompt", "--field", help="With --prompts: the field of an object that holds its prompt."),
    interactive: bool = typer.Option(False, "--interactive", "-i", help="Write in turns: what you type is added, and continued."),
    count_: int = typer.Option(1, "-n", min=1, max=1024, help="How many samples of each prompt."),
    max_new_tokens: int = typer.Option(200, "--max-new-tokens", help="Longest continuation."),
    temperature: float = typer.Option(0.8, "--temperature", help="0 always takes the likeliest token."),
    top_k: int = typer.Option(50, "--top-k", help="Only the K likeliest tokens; the vocabulary's size leaves all of them."),
    top_p: float | None = typer.Option(None, "--top-p", help="Only the likeliest tokens that together have this probability."),
    min_p: float | None = typer.Option(None, "--min-p", help="Only tokens with this share of the likeliest one's probability."),
    repetition_penalty: float = typer.Option(
        1.0, "--repetition-penalty", help="Above 1: what was said, prompt too, becomes less likely."
    ),
    frequency_penalty: float = typer.Option(
        0.0, "--frequency-penalty", help="Subtracted from a token's logit each time it was written."
    ),
    presence_penalty: float = typer.Option(0.0, "--presence-penalty", help="Subtracted once from the logit of what was written."),
    stop: list[str] | None = typer.Option(None, "--stop", help="End before this text; may be repeated."),
    logit_bias: list[str] | None = typer.Option(
        None, "--logit-bias", metavar="TOKEN=X", help="Add X to a token's logit; TOKEN is its text or @ID. May be repeated."
    ),
    ban: list[str] | None = typer.Option(None, "--ban", metavar="TOKEN", help="Never write this token; may be repeated."),
    force: str = typer.Option("", "--force", help="What the continuation begins with, whatever its probability."),
    regex: str | None = typer.Option(None, "--regex", help="The continuation matches this regular expression, all of it."),
    choice: list[str] | None = typer.Option(None, "--choice", help="The continuation is one of the choices; may be repeated."),
    beams: int | None = typer.Option(None, "--beams", help="Beam search of this width instead of drawing; gives the -n best."),
    length_penalty: float = typer.Option(1.0, "--length-penalty", help="With --beams: score = log-probability / length ** this."),
    best_of: int | None = typer.Option(None, "--best-of", help="Draw this many samples and give the -n best."),
    rank: str = typer.Option(
        "likelihood", "--rank", help="With --best-of: by likelihood, or by contrast to writing without the prompt."
    ),
    logprobs: int | None = typer.Option(None, "--logprobs", help="Show each token's log-probability and this many alternatives."),
    seed: int | None = typer.Option(None, "--seed", min=0, help="The same seed gives the same text; default: a new one each time."),
    no_stream: bool = typer.Option(False, "--no-stream", help="Print when all is written."),
    weights: str = WEIGHTS,
    compiled: bool | None = COMPILE,
    run: str | None = RUN,
    checkpoint: str | None = CHECKPOINT,
    device: str = DEVICE,
    threads: int | None = THREADS,
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Write text with a trained model."""
    _refuse_what_does_not_go_together(ctx)
    if beams is not None and beams < count_:
        raise InputError(f"the best {count_} of {beams}?", where="--beams", hint=f"{count_} or more")
    checked_weights(weights)
    console = stderr()
    opened = open_run(run, console, quiet=quiet)
    chosen = opened.checkpoint(checkpoint)  # what is not there is told before torch is loaded
    asked = list(_prompts(prompt, prompt_file, prompts, field))
    for text, option in (
        (force, "--force"),
        *((one, "--stop") for one in stop or ()),
        *((one, "--choice") for one in choice or ()),
    ):
        checked_text(text, option)

    from tinylm.device import resolve, set_threads

    target = resolve(device)
    from tinylm.generation.engine import ROWS, Request, sample_seed, write
    from tinylm.generation.sampling import SamplingOptions
    from tinylm.generation.search import beam_search
    from tinylm.generation.search import best_of as best_samples
    from tinylm.model.decoder import prepared

    tokenizer = opened.tokenizer
    options = SamplingOptions(
        max_new_tokens,
        temperature,
        top_k,
        top_p,
        min_p,
        repetition_penalty,
        tuple(stop or ()),
        frequency_penalty,
        presence_penalty,
        _biases(tokenizer, logit_bias or (), ban or ()),
        tuple(tokenizer.encode(force)),
        logprobs,
    )
    constraint = _constraint(tokenizer, regex, choice)
    set_threads(threads)
    reporter = ConsoleReporter(console, quiet=quiet)
    together = -(-len(asked) * max(count_, best_of or 0) // ROWS)
    decoder = prepared(
        opened.network(chosen, target),
        weights=checked_weights(weights),
        compiled=compiled,
        steps=None if interactive else together * max_new_tokens,
        reporter=reporter,
    )
    unknown = sum(tokenizer.encode(text).count(tokenizer.unknown) for text, _ in asked) if tokenizer.unknown is not None else 0
    if unknown:
        reporter.warn(f"{unknown} characters of the prompt are not in the model's vocabulary")
    seed = secrets.randbelow(2**31) if seed is None else seed
    document = {"run": str(opened.path), "checkpoint": chosen.name, "seed": seed}
    if interactive:

        def turn(text: str, number: int, heard: Callable[[str], None]) -> str:
            request = Request(text, options, sample_seed(seed, number), constraint, heard)
            return next(write(decoder, tokenizer, [request])).text

        _converse(prompt, turn)
        return
    streaming = count_ == 1 and prompts is None and not json and not no_stream and beams is None and best_of is None
    if streaming:
        out(asked[0][0], end="")
    found: Iterator[tuple[dict[str, Any], Sample, float | None]]  # the line a prompt came in, what was written, its rank
    if beams is not None or best_of is not None:

        def search(text: str) -> list[Ranked]:
            if beams is None:
                among = best_of or count_
                return best_samples(
                    decoder, tokenizer, text, options, count=count_, among=among, ranking=rank, seed=seed, constraint=constraint
                )
            ranked = beam_search(
                decoder,
                tokenizer,
                text,
                beams=beams,
                max_new_tokens=max_new_tokens,
                length_penalty=length_penalty,
                constraint=constraint,
            )
            return ranked[:count_]

        found = ((record, one.sample, one.score) for text, record in asked for one in search(text))
    else:
        heard = (lambda new: out(new, end="")) if streaming else None
        repeated = [(*one, index) for one in asked for index in range(count_)]
        requests = [Request(text, options, sample_seed(seed, index), constraint, heard) for text, _, index in repeated]
        found = ((line[1], one, None) for line, one in zip(repeated, write(decoder, tokenizer, requests), strict=True))
    if prompts is not None and not json:
        for record, one, score in found:
            out(json_module.dumps({**record, **_facts(one, tokenizer, score)}, ensure_ascii=False))
        return
    if json:
        document = {"run": str(opened.path), "checkpoint": chosen.name, "seed": seed}
        print_json({**document, "samples": [{**record, **_facts(one, tokenizer, score)} for record, one, score in found]})
        return
    written = [(one, score) for _, one, score in found]
    if streaming:
        out("")
    else:
        out("\n\n---\n\n".join(("" if score is None else f"[{score:.4f}] ") + one.prompt + one.text for one, score in written))
    _show_choices([one for one, _ in written], tokenizer)
    if not quiet:
        total = things(sum(len(one.token_ids) for one, _ in written), "token")
        reasons = ", ".join(dict.fromkeys(one.finish_reason for one, _ in written))
        drawn = [f"--seed {seed}"] if beams is None else []
        speeds = [one.tokens_per_second for one, _ in written if one.tokens_per_second]
        speed = [f"{count(sum(speeds))} tokens/s"] if speeds else []
        console.say(", ".join([total, *speed, reasons, chosen.name, *drawn]), "dim")


def _refuse_what_does_not_go_together(ctx: typer.Context) -> None:
    """No option is accepted and then ignored."""
    for several in (("prompt", "prompt_file", "prompts"), ("regex", "choice"), ("beams", "best_of"), ("prompts", "interactive")):
        if len(both := given(ctx, several)) > 1:
            raise InputError("one of them, not both", where=", ".join(both))
    needs = {"field": "prompts", "length_penalty": "beams", "rank": "best_of"}
    for option, other in needs.items():
        if (found := given(ctx, (option,))) and not given(ctx, (other,)):
            raise InputError(f"only means something with --{other.replace('_', '-')}", where=found[0])
    refused = {
        "beams": UNSEARCHED,
        "interactive": ("count_", "beams", "best_of", "json", "prompt_file", "no_stream", "logprobs"),
        "best_of": ("logprobs",),
        "regex": ("stop", "force"),
        "choice": ("stop", "force"),
    }
    for option, others in refused.items():
        if (found := given(ctx, (option,))) and (clashing := given(ctx, others)):
            raise InputError(f"not together with {found[0]}", where=", ".join(clashing))


def _prompts(prompt: str, file: Path | None, many: str | None, field: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each prompt, with the line it came in."""
    if many is None:
        if file is not None:
            prompt = _decoded(_read(file), str(file))
        elif prompt == "-":
            prompt = _decoded(sys.stdin.buffer.read(), "-")
        yield checked_text(prompt, "--prompt"), {"prompt": prompt}
        return
    text = _decoded(sys.stdin.buffer.read() if many == "-" else _read(Path(many)), many)
    found = False
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        found = True
        try:
            record = json_module.loads(line)
        except ValueError as error:
            raise InputError(f"not JSON: {error}", where=f"{many}:{number}") from None
        record = {field: record} if isinstance(record, str) else record
        if not isinstance(record, dict) or not isinstance(record.get(field), str):
            raise InputError(f"no prompt in field {field!r}", where=f"{many}:{number}", hint="--field names another")
        yield checked_text(record[field], f"{many}:{number}"), record
    if not found:
        raise InputError("no prompts", where=many)


def _read(path: Path) -> bytes:
    if path.is_dir() or not path.exists():
        raise InputError("no such file", where=str(path))
    return path.read_bytes()


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 at byte {error.start}", where=where) from None


def _biases(tokenizer: Tokenizer, biases: list[str] | tuple[()], banned: list[str] | tuple[()]) -> tuple[tuple[int, float], ...]:
    found = []
    for written in biases:
        token, _, value = written.rpartition("=")
        try:
            bias = float(value)
        except ValueError:
            token = ""
        if not token:
            raise InputError(f"{written!r} is not TOKEN=X with a number X", where="--logit-bias")
        found.append((_token(tokenizer, token, "--logit-bias"), bias))
    return (*found, *((_token(tokenizer, token, "--ban"), float("-inf")) for token in banned))


def _token(tokenizer: Tokenizer, named: str, option: str) -> int:
    try:
        return tokenizer.token(checked_text(named, option))
    except InputError as error:
        raise InputError(error.message, where=option, hint=error.hint) from None


def _constraint(tokenizer: Tokenizer, regex: str | None, choices: list[str] | None) -> Constraint | None:
    from tinylm.generation.constraint import Constraint

    if regex is not None:
        return Constraint(checked_text(regex, "--regex"), tokenizer)
    return Constraint.choices(choices, tokenizer) if choices else None


def _facts(sample: Sample, tokenizer: Tokenizer, score: float | None) -> dict[str, Any]:
    """A sample as programs read it."""
    facts: dict[str, Any] = {
        "prompt": sample.prompt,
        "text": sample.text,
        "tokens": len(sample.token_ids),
        "finish_reason": sample.finish_reason,
        "tokens_per_second": sample.tokens_per_second,
    }
    if score is not None:
        facts["score"] = score
    if sample.choices:
        facts["logprobs"] = [
            {
                **_named(tokenizer, choice.id, choice.logprob),
                "alternatives": [_named(tokenizer, *alternative) for alternative in choice.alternatives],
            }
            for choice in sample.choices
        ]
    return facts


def _named(tokenizer: Tokenizer, id: int, logprob: float) -> dict[str, Any]:
    return {"token": tokenizer.decode([id]), "id": id, "logprob": logprob}


def _show_choices(samples: list[Sample], tokenizer: Tokenizer) -> None:
    """A line for every token: its probability, itself, what else it could have been."""
    for sample in samples:
        if sample.choices:
            out("")
        for choice in sample.choices:
            others = "  ".join(
                f"{_quoted(tokenizer, id)} {math.exp(logprob):.1%}" for id, logprob in choice.alternatives if id != choice.id
            )
            out(f"{math.exp(choice.logprob):7.2%}  {_quoted(tokenizer, choice.id):<16}  {others}".rstrip())


def _quoted(tokenizer: Tokenizer, id: int) -> str:
    return json_module.dumps(tokenizer.decode([id]), ensure_ascii=False)


def _converse(text: str, write: Callable[[str, int, Callable[[str], None]], str]) -> None:
    """Turns: a line that is typed is added to the text, an empty one lets it go on; /new begins again, Ctrl-D ends."""
    out("Type a text to continue it, nothing to go on, /new to begin again; Ctrl-D ends.")
    turn = 0
    if text:
        out(text, end="")
        text += write(text, turn, lambda new: out(new, end=""))
        out("")
    while True:
        try:
            typed = input("> ")
        except EOFError:
            out("")
            return
        if typed.strip() == "/new":
            text = ""
            continue
        turn += 1
        text += checked_text(typed, "what was typed")
        text += write(text, turn, lambda new: out(new, end=""))
        out("")
