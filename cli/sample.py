"""`tinylm sample`: generate text with a trained model."""

from __future__ import annotations

import json as json_module
import math
import secrets
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tinylm.errors import InputError
from tinylm.generation.option_ranges import check_ranges

from .console import (
    CHECKPOINTS,
    COMPILE,
    DECODING_WEIGHTS,
    DEVICE,
    JSON,
    QUIET,
    RUNS,
    THREADS,
    ConsoleReporter,
    checked_text,
    checked_weights,
    format_count,
    given_options,
    open_ensemble,
    pluralize,
    print_json,
    stderr_console,
    write_stdout,
)

if TYPE_CHECKING:
    from tinylm.generation.constraint import Constraint
    from tinylm.generation.engine import Request, Sample
    from tinylm.generation.search import RankedSample
    from tinylm.model.state import DecodingModel
    from tinylm.reporting import Reporter
    from tinylm.tokenizer import Tokenizer

app = typer.Typer(add_completion=False)
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty", "seed")
_MUTUALLY_EXCLUSIVE = (("prompt", "prompt_file", "prompts"), ("regex", "choice"), ("beams", "best_of"), ("prompts", "interactive"))
_REQUIRES = {"field": "prompts", "length_penalty": "beams", "rank": "best_of"}
_INCOMPATIBLE = {
    "beams": (*_SAMPLING, "stop", "logit_bias", "ban", "force", "logprobs", "best_of", "rank"),
    "interactive": ("count", "beams", "best_of", "json", "prompt_file", "no_stream", "logprobs"),
    "best_of": ("logprobs",),
    "regex": ("stop", "force"),
    "choice": ("stop", "force"),
}
"""For each option, the options that cannot be combined with it."""


@dataclass(frozen=True)
class _Prompt:
    text: str
    record: dict[str, Any]
    """The JSON object that contains the prompt. Its fields are copied to the output."""


@dataclass(frozen=True)
class _Generation:
    """Arguments shared by all generation methods. `template` contains the sampling options, the user's seed, and the constraint."""

    decoder: DecodingModel[Any]
    tokenizer: Tokenizer
    template: Request
    count: int


@dataclass(frozen=True)
class _Result:
    """A sample, the record of its prompt, and its score if it was ranked."""

    record: dict[str, Any]
    sample: Sample
    score: float | None = None


@app.command()
def sample(
    ctx: typer.Context,
    prompt: str = typer.Option(
        "", "--prompt", "-p", help="Text to continue, or - for standard input. Default: start a new document."
    ),
    prompt_file: Path | None = typer.Option(None, "--prompt-file", help="Read the prompt from this file."),
    prompts: str | None = typer.Option(
        None,
        "--prompts",
        help="Continue each prompt in a .jsonl file or standard input (-), one string or object per line, and print .jsonl.",
    ),
    field: str = typer.Option("prompt", "--field", help="With --prompts: the object field that contains the prompt."),
    interactive: bool = typer.Option(
        False, "--interactive", "-i", help="Take turns with the model, which continues the text after each line that you type."
    ),
    count: int = typer.Option(1, "-n", min=1, max=1024, help="Number of samples per prompt."),
    max_new_tokens: int = typer.Option(200, "--max-new-tokens", max=1 << 24, help="Maximum length of a continuation in tokens."),
    temperature: float = typer.Option(0.8, "--temperature", help="Sampling temperature; 0 is greedy decoding."),
    top_k: int = typer.Option(50, "--top-k", help="Sample only from the K most likely tokens."),
    top_p: float | None = typer.Option(
        None, "--top-p", help="Sample only from the smallest set of most likely tokens whose total probability reaches this value."
    ),
    min_p: float | None = typer.Option(
        None, "--min-p", help="Sample only from tokens with at least this fraction of the top token's probability."
    ),
    repetition_penalty: float = typer.Option(
        1.0, "--repetition-penalty", help="Above 1: make tokens that already occur in the text less likely."
    ),
    frequency_penalty: float = typer.Option(
        0.0,
        "--frequency-penalty",
        help="Subtract this from a token's logit for each occurrence of the token in the generated text.",
    ),
    presence_penalty: float = typer.Option(
        0.0, "--presence-penalty", help="Subtract this from the logit of every token that occurs in the generated text."
    ),
    stop: list[str] | None = typer.Option(None, "--stop", help="Stop before this text. Can be repeated."),
    logit_bias: list[str] | None = typer.Option(
        None, "--logit-bias", metavar="TOKEN=X", help="Add X to a token's logit. TOKEN is the token's text or @ID. Can be repeated."
    ),
    ban: list[str] | None = typer.Option(None, "--ban", metavar="TOKEN", help="Never generate this token. Can be repeated."),
    force: str = typer.Option("", "--force", help="Begin the continuation with this text."),
    regex: str | None = typer.Option(None, "--regex", help="Constrain the whole continuation to a regular expression."),
    choice: list[str] | None = typer.Option(
        None, "--choice", help="Restrict the continuation to the --choice texts. Can be repeated."
    ),
    beams: int | None = typer.Option(None, "--beams", help="Use beam search with this many beams and return the -n best samples."),
    length_penalty: float = typer.Option(
        1.0, "--length-penalty", help="With --beams: the exponent A in score = log-probability / length ** A."
    ),
    best_of: int | None = typer.Option(None, "--best-of", help="Generate this many samples and return the -n best."),
    rank: str = typer.Option(
        "likelihood",
        "--rank",
        help="With --best-of: rank by likelihood, or by contrast (the likelihood minus that without the prompt).",
    ),
    logprobs: int | None = typer.Option(
        None, "--logprobs", help="Show the log-probability of each token and this many alternatives."
    ),
    seed: int | None = typer.Option(None, "--seed", min=0, help="Random seed. Default: a different one each time."),
    no_stream: bool = typer.Option(False, "--no-stream", help="Print the text only when it is complete."),
    weights: str | None = DECODING_WEIGHTS,
    compiled: bool | None = COMPILE,
    run: list[str] | None = RUNS,
    checkpoint: list[str] | None = CHECKPOINTS,
    device: str = DEVICE,
    threads: int | None = THREADS,
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Generate text with a trained model.

    With several --run or --checkpoint options, each token is sampled from the mean of the models' probabilities.
    """
    _check_combinations(ctx)
    if beams is not None and beams < count:
        raise InputError(f"must be at least -n ({count})", where="--beams")
    numbers: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "frequency_penalty": frequency_penalty,
        "presence_penalty": presence_penalty,
        "logprobs": logprobs,
    }
    check_ranges(**numbers)  # before torch is imported
    weight_kind = None if weights is None else checked_weights(weights)
    console = stderr_console()
    opened = open_ensemble(run, checkpoint, console, quiet=quiet)  # reports a missing checkpoint before torch is imported
    inputs = list(_read_prompts(prompt, prompt_file, prompts, field))
    checked_text(force, "--force")
    for texts, option in ((stop, "--stop"), (choice, "--choice")):
        for text in texts or ():
            checked_text(text, option)

    from tinylm.device import resolve, set_threads

    target = resolve(device)
    from tinylm.generation.engine import DEFAULT_ROWS, Request
    from tinylm.generation.ensemble import make_ensemble_decoder, members_of
    from tinylm.generation.precompile import compile_in_background
    from tinylm.generation.sampling import SamplingOptions
    from tinylm.model.decoder import should_compile_for_later

    tokenizer = opened.members[0].run.tokenizer
    options = SamplingOptions(
        **numbers,
        stop=tuple(stop or ()),
        logit_bias=_logit_biases(tokenizer, logit_bias or (), ban or ()),
        forced=tuple(tokenizer.encode(force)),
    )
    seed = secrets.randbelow(2**31) if seed is None else seed
    template = Request("", options, seed, _constraint(tokenizer, regex, choice))
    set_threads(threads)
    reporter = ConsoleReporter(console, quiet=quiet)
    batches = -(-len(inputs) * max(count, best_of or 0) // DEFAULT_ROWS)
    steps = None if interactive else batches * max_new_tokens
    networks = (member.run.network(member.checkpoint, target) for member in opened.members)
    decoder = make_ensemble_decoder(networks, weights=weight_kind, compiled=compiled, steps=steps, reporter=reporter)
    if compiled is None and any(should_compile_for_later(member, steps) for member in members_of(decoder)):
        ctx.call_on_close(partial(compile_in_background, reporter))
    _warn_about_unknown_characters(tokenizer, inputs, reporter)
    generation = _Generation(decoder, tokenizer, template, count)
    if interactive:
        _run_interactive(generation, prompt)
        return
    streaming = count == 1 and prompts is None and not json and not no_stream and beams is None and best_of is None
    if beams is not None:
        results = _beam_search(generation, inputs, beams, length_penalty)
    elif best_of is not None:
        results = _best_of(generation, inputs, best_of, rank)
    elif streaming:
        results = _stream_sample(generation, inputs[0])
    else:
        results = _generate_samples(generation, inputs)
    if json:
        documents = [_document(result, tokenizer) for result in results]
        members = {} if opened.is_single else {"members": [member.as_dict() for member in opened.members]}
        print_json({"run": opened.name, "checkpoint": opened.checkpoint, **members, "seed": seed, "samples": documents})
        return
    if prompts is not None:
        for result in results:
            write_stdout(json_module.dumps(_document(result, tokenizer), ensure_ascii=False))
        return
    generated = list(results)
    if not streaming:
        write_stdout("\n\n---\n\n".join(_text_with_score(result) for result in generated))
    samples = [result.sample for result in generated]
    _print_token_choices(samples, tokenizer)
    if not quiet:
        random_seed = [f"--seed {seed}"] if beams is None else []
        model = opened.checkpoint if opened.is_single else f"ensemble of {len(opened.members)}"
        console.print_line(", ".join([*_statistics(samples), model, *random_seed]), "dim")


def _check_combinations(ctx: typer.Context) -> None:
    """Raise `InputError` for options that are incompatible or would have no effect."""
    for group in _MUTUALLY_EXCLUSIVE:
        if len(given := given_options(ctx, group)) > 1:
            raise InputError("these options are mutually exclusive", where=", ".join(given))
    for option, required in _REQUIRES.items():
        if (given := given_options(ctx, (option,))) and not given_options(ctx, (required,)):
            raise InputError(f"requires --{required.replace('_', '-')}", where=given[0])
    for option, others in _INCOMPATIBLE.items():
        if (given := given_options(ctx, (option,))) and (conflicting := given_options(ctx, others)):
            raise InputError(f"cannot be combined with {given[0]}", where=", ".join(conflicting))


def _read_prompts(prompt: str, file: Path | None, prompts: str | None, field: str) -> Iterator[_Prompt]:
    """Yield the prompt from --prompt or --prompt-file, or the prompts from --prompts. Raises `InputError` for unreadable input."""
    if prompts is not None:
        yield from _read_prompt_lines(prompts, field)
        return
    if file is not None:
        prompt = _decode(_read_file(file), str(file))
    elif prompt == "-":
        prompt = _decode(sys.stdin.buffer.read(), "-")
    yield _Prompt(checked_text(prompt, "--prompt"), {"prompt": prompt})


def _read_prompt_lines(name: str, field: str) -> Iterator[_Prompt]:
    text = _decode(sys.stdin.buffer.read() if name == "-" else _read_file(Path(name)), name)
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise InputError("contains no prompts", where=name)
    for number, line in lines:
        try:
            record = json_module.loads(line)
        except ValueError as error:
            raise InputError(f"not JSON: {error}", where=f"{name}:{number}") from None
        record = {field: record} if isinstance(record, str) else record
        if not isinstance(record, dict) or not isinstance(record.get(field), str):
            raise InputError(f"no prompt in field {field!r}", where=f"{name}:{number}", hint="choose another field with --field")
        yield _Prompt(checked_text(record[field], f"{name}:{number}"), record)


def _read_file(path: Path) -> bytes:
    if path.is_dir():
        raise InputError("is a folder", where=str(path), hint="pass a file path")
    if not path.exists():
        raise InputError("no such file", where=str(path))
    return path.read_bytes()


def _decode(data: bytes, where: str) -> str:
    """Decode UTF-8 text without a byte order mark, which some editors write at the beginning of a file."""
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 at byte {error.start}", where=where) from None


def _logit_biases(
    tokenizer: Tokenizer, biases: list[str] | tuple[()], banned: list[str] | tuple[()]
) -> tuple[tuple[int, float], ...]:
    """Convert the values of --logit-bias and --ban to (token id, bias) pairs."""
    pairs = []
    for argument in biases:
        token, _, value = argument.rpartition("=")
        try:
            bias = float(value)
        except ValueError:
            token = ""
        if not token:
            raise InputError(f"{argument!r} is not of the form TOKEN=NUMBER", where="--logit-bias")
        pairs.append((_token_id(tokenizer, token, "--logit-bias"), bias))
    return (*pairs, *((_token_id(tokenizer, token, "--ban"), float("-inf")) for token in banned))


def _token_id(tokenizer: Tokenizer, token: str, option: str) -> int:
    try:
        return tokenizer.token_id(checked_text(token, option))
    except InputError as error:
        raise InputError(error.message, where=option, hint=error.hint) from None


def _constraint(tokenizer: Tokenizer, regex: str | None, choices: list[str] | None) -> Constraint | None:
    from tinylm.generation.constraint import Constraint

    if regex is not None:
        return Constraint(checked_text(regex, "--regex"), tokenizer)
    return Constraint.choices(choices, tokenizer) if choices else None


def _warn_about_unknown_characters(tokenizer: Tokenizer, prompts: list[_Prompt], reporter: Reporter) -> None:
    if tokenizer.unknown is None:
        return
    unknown = sum(tokenizer.encode(prompt.text).count(tokenizer.unknown) for prompt in prompts)
    if unknown:
        reporter.warn(f"characters in the prompt that are not in the model's vocabulary: {unknown}")


def _generate_samples(generation: _Generation, prompts: list[_Prompt]) -> Iterator[_Result]:
    """Sample every prompt `count` times with continuous batching. Yield the results in prompt order."""
    from tinylm.generation.engine import generate_batch, sample_seed

    template = generation.template
    seeds = [sample_seed(template.seed, index) for index in range(generation.count)]
    requests = [replace(template, prompt=prompt.text, seed=seed) for prompt in prompts for seed in seeds]
    records = [prompt.record for prompt in prompts for _ in seeds]
    for record, sample in zip(records, generate_batch(generation.decoder, generation.tokenizer, requests), strict=True):
        yield _Result(record, sample)


def _stream_sample(generation: _Generation, prompt: _Prompt) -> Iterator[_Result]:
    """Sample a prompt once. Print the prompt, then stream the generated text."""
    write_stdout(prompt.text, end="")
    template = replace(generation.template, on_text=_write_stdout_part)
    yield from _generate_samples(replace(generation, template=template), [prompt])
    write_stdout("")


def _write_stdout_part(text: str) -> None:
    write_stdout(text, end="")


def _beam_search(generation: _Generation, prompts: list[_Prompt], beams: int, length_penalty: float) -> Iterator[_Result]:
    """For each prompt, yield the best `count` continuations of a beam search."""
    from tinylm.generation.search import beam_search

    for prompt in prompts:
        ranked = beam_search(
            generation.decoder,
            generation.tokenizer,
            prompt.text,
            beams=beams,
            max_new_tokens=generation.template.options.max_new_tokens,
            length_penalty=length_penalty,
            constraint=generation.template.constraint,
        )
        yield from _ranked_results(prompt, ranked[: generation.count])


def _best_of(generation: _Generation, prompts: list[_Prompt], candidates: int, ranking: str) -> Iterator[_Result]:
    """For each prompt, generate `candidates` samples and yield the best `count`."""
    from tinylm.generation.search import best_of

    for prompt in prompts:
        request = replace(generation.template, prompt=prompt.text)
        ranked = best_of(
            generation.decoder, generation.tokenizer, request, count=generation.count, candidates=candidates, ranking=ranking
        )
        yield from _ranked_results(prompt, ranked)


def _ranked_results(prompt: _Prompt, ranked: list[RankedSample]) -> Iterator[_Result]:
    for ranked_sample in ranked:
        yield _Result(prompt.record, ranked_sample.sample, ranked_sample.score)


def _run_interactive(generation: _Generation, text: str) -> None:
    """Alternate between appending a typed line to the text and generating a continuation."""
    write_stdout("Type text for the model to continue, or press Enter to generate more. /new starts a new text, Ctrl-D quits.")
    turn = 0
    if text:
        write_stdout(text, end="")
        text += _continue(generation, text, turn)
    while True:
        try:
            typed = input("> ")
        except EOFError:
            write_stdout("")
            return
        if typed.strip() == "/new":
            text = ""
            continue
        turn += 1
        text += checked_text(typed, "standard input")
        text += _continue(generation, text, turn)


def _continue(generation: _Generation, text: str, turn: int) -> str:
    """Generate, stream and return the continuation of a text."""
    from tinylm.generation.engine import generate_batch, sample_seed

    seed = sample_seed(generation.template.seed, turn)
    request = replace(generation.template, prompt=text, seed=seed, on_text=_write_stdout_part)
    sample = next(generate_batch(generation.decoder, generation.tokenizer, [request]))
    write_stdout("")
    return sample.text


def _document(result: _Result, tokenizer: Tokenizer) -> dict[str, Any]:
    """Convert a result to a JSON object with the fields of the prompt's record and of the sample."""
    sample = result.sample
    document: dict[str, Any] = {
        **result.record,
        "prompt": sample.prompt,
        "text": sample.text,
        "tokens": len(sample.token_ids),
        "finish_reason": sample.finish_reason,
        "tokens_per_second": sample.tokens_per_second,
    }
    if result.score is not None:
        document["score"] = result.score
    if sample.choices:
        document["logprobs"] = [
            {
                **_token_document(tokenizer, choice.id, choice.logprob),
                "alternatives": [_token_document(tokenizer, *alternative) for alternative in choice.alternatives],
            }
            for choice in sample.choices
        ]
    return document


def _token_document(tokenizer: Tokenizer, id: int, logprob: float) -> dict[str, Any]:
    return {"token": tokenizer.decode([id]), "id": id, "logprob": logprob}


def _text_with_score(result: _Result) -> str:
    score = "" if result.score is None else f"[{result.score:.4f}] "
    return score + result.sample.prompt + result.sample.text


def _print_token_choices(samples: list[Sample], tokenizer: Tokenizer) -> None:
    """Print one line per token: its probability, the token itself, and the alternatives."""
    for sample in samples:
        if sample.choices:
            write_stdout("")
        for choice in sample.choices:
            alternatives = "  ".join(
                f"{_quoted(tokenizer, id)} {math.exp(logprob):.1%}" for id, logprob in choice.alternatives if id != choice.id
            )
            write_stdout(f"{math.exp(choice.logprob):7.2%}  {_quoted(tokenizer, choice.id):<16}  {alternatives}".rstrip())


def _quoted(tokenizer: Tokenizer, id: int) -> str:
    return json_module.dumps(tokenizer.decode([id]), ensure_ascii=False)


def _statistics(samples: list[Sample]) -> list[str]:
    """Return the number of tokens, the throughput (if measured), and the finish reasons."""
    total = pluralize(sum(len(sample.token_ids) for sample in samples), "token")
    speed = sum(sample.tokens_per_second for sample in samples)
    reasons = ", ".join(dict.fromkeys(sample.finish_reason for sample in samples))
    return [total, *([f"{format_count(speed)} tokens/s"] if speed else []), reasons]
