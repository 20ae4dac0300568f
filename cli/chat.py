"""`tinylm chat`: talk to a model that was fine-tuned on conversations."""

from __future__ import annotations

import json
import os
import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from tinylm.errors import InputError

from .console import (
    CHECKPOINT,
    COMPILE,
    DECODING_WEIGHTS,
    DEVICE,
    QUIET,
    RUN,
    THREADS,
    ConsoleReporter,
    StderrConsole,
    checked_text,
    checked_weights,
    open_run,
    pluralize,
    stderr_console,
    write_stdout,
)

if TYPE_CHECKING:
    from tinylm.generation.chat import ChatSession

app = typer.Typer(add_completion=False)
_COMMANDS = {
    "/reset": "clear the conversation",
    "/save FILE": "append the conversation to a .jsonl file, in the training data format",
    "/help": "list these commands",
    "/quit": "end the chat; Ctrl-D also works",
}


@app.command()
def chat(
    system: str | None = typer.Option(None, "--system", help="A system message at the start of every conversation."),
    max_new_tokens: int = typer.Option(200, "--max-new-tokens", min=1, max=1 << 24, help="Maximum number of tokens in an answer."),
    temperature: float = typer.Option(0.8, "--temperature", help="Sampling temperature; 0 is greedy decoding."),
    top_k: int = typer.Option(50, "--top-k", help="Sample only from the K most likely tokens."),
    top_p: float | None = typer.Option(
        None, "--top-p", help="Sample only from the smallest set of most likely tokens whose total probability reaches this value."
    ),
    seed: int | None = typer.Option(None, "--seed", min=0, help="Random seed. Default: a different one each time."),
    weights: str | None = DECODING_WEIGHTS,
    compiled: bool | None = COMPILE,
    run: str | None = RUN,
    checkpoint: str | None = CHECKPOINT,
    device: str = DEVICE,
    threads: int | None = THREADS,
    quiet: bool = QUIET,
) -> None:
    """Talk to a model that was fine-tuned on conversations.

    Each line that you type is a message. The model answers until it ends its turn. If the context is full, the oldest exchanges are
    dropped. /help lists the commands.
    """
    if system is not None and not checked_text(system, "--system").strip():
        raise InputError("must not be empty", where="--system")
    kind = None if weights is None else checked_weights(weights)
    console = stderr_console()
    opened = open_run(run, console, quiet=quiet)
    chosen = opened.checkpoint(checkpoint)
    encoder = opened.require_chat()

    from tinylm.device import resolve, set_threads
    from tinylm.generation.chat import ChatSession
    from tinylm.generation.sampling import SamplingOptions
    from tinylm.model.decoder import make_decoder

    set_threads(threads)
    options = SamplingOptions(max_new_tokens, temperature, top_k, top_p)
    reporter = ConsoleReporter(console, quiet=quiet)
    decoder = make_decoder(opened.network(chosen, resolve(device)), weights=kind, compiled=compiled, steps=None, reporter=reporter)
    session = ChatSession(decoder, encoder, options, secrets.randbelow(2**31) if seed is None else seed, system)
    if not quiet and sys.stdin.isatty():
        console.print_line("Type a message. /help lists the commands, Ctrl-D quits.", "dim")
    _Loop(session, console, quiet).run()


class _Loop:
    """Reads messages and commands from standard input until the input ends."""

    def __init__(self, session: ChatSession, console: StderrConsole, quiet: bool) -> None:
        self._session, self._console, self._quiet = session, console, quiet
        self._interactive = sys.stdin.isatty()

    def run(self) -> None:
        while True:
            try:
                line = input("> ") if self._interactive else _next_line()
            except EOFError:
                if self._interactive:
                    write_stdout("")
                return
            if not line.strip():
                continue
            try:
                if line.startswith("/"):
                    if not self._command(*line.split(None, 1)):
                        return
                else:
                    self._answer(checked_text(line, "standard input"))
            except InputError as error:
                if not self._interactive:
                    raise
                self._console.print_line(f"error: {error}", "red")

    def _answer(self, text: str) -> None:
        sample, prompt = self._session.ask(text, lambda part: write_stdout(part, end=""))
        write_stdout("")
        if prompt.left_out:
            self._note(f"the context is full: dropped {pluralize(prompt.left_out, 'message')} from the beginning")
        if sample.finish_reason == "length":
            self._note(f"the answer was cut off after {pluralize(len(sample.token_ids), 'token')}")

    def _command(self, name: str, argument: str = "") -> bool:
        """Run a command. Return False if it ends the chat."""
        if name == "/quit":
            return False
        if name == "/reset":
            self._session.reset()
            self._note("the conversation was reset")
        elif name == "/save":
            self._save(argument.strip())
        elif name == "/help":
            width = max(map(len, _COMMANDS))
            for command, meaning in _COMMANDS.items():
                self._console.print_line(f"{command:<{width}}  {meaning}", "dim")
        else:
            raise InputError(f"no such command {name}", hint="/help lists the commands")
        return True

    def _save(self, path: str) -> None:
        if not path:
            raise InputError("requires a file name", where="/save", hint="for example /save chat.jsonl")
        if not self._session.messages:
            raise InputError("there is nothing to save yet", where="/save")
        file = Path(os.path.expanduser(path))
        messages = [message.as_dict() for message in self._session.conversation]
        try:
            with open(file, "a", encoding="utf-8") as stream:
                stream.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
        except OSError as error:
            raise InputError(error.strerror or "cannot be written", where=str(file)) from None
        self._note(f"appended {pluralize(len(messages), 'message')} to {file}")

    def _note(self, text: str) -> None:
        if not self._quiet:
            self._console.print_line(text, "dim")


def _next_line() -> str:
    """Return the next line of standard input. Raises `EOFError` at the end of the input."""
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\r\n")
