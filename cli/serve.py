"""`tinylm serve`: serve a model over HTTP."""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
from types import FrameType
from typing import TYPE_CHECKING

import typer

from tinylm.errors import InputError, WorkError, missing_extra

from .console import (
    CHECKPOINT,
    COMPILE,
    DECODING_WEIGHTS,
    DEVICE,
    QUIET,
    RUN,
    THREADS,
    ConsoleReporter,
    checked_weights,
    given_options,
    open_run,
    stderr_console,
    write_stdout,
)

if TYPE_CHECKING:
    from starlette.applications import Starlette

app = typer.Typer(add_completion=False)
LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")
BACKLOG = 1024
"""Number of connections that the operating system queues while the server is busy."""
GRACEFUL_SECONDS = 2
KEEP_ALIVE_SECONDS = 10
"""Longer than the common client timeout of five seconds, so that no client sends a request on a connection that is being closed."""
EXIT_SECONDS = 6
"""The process exits no later than this many seconds after a signal."""


@app.command()
def serve(
    ctx: typer.Context,
    host: str = typer.Option(
        "127.0.0.1", "--host", help="Address to listen on. Any address except loopback can be reached from the network."
    ),
    port: int = typer.Option(8000, "--port", min=0, max=65535, help="Port to listen on; 0 picks a free one."),
    rows: int = typer.Option(16, "--rows", min=1, max=1024, help="Maximum number of samples generated at the same time."),
    waiting: int = typer.Option(
        256, "--waiting", min=1, help="Maximum number of samples in the queue; further requests are rejected with status 429."
    ),
    max_tokens: int = typer.Option(2048, "--max-tokens", min=1, help="Largest max_tokens that a request can ask for."),
    max_body: int = typer.Option(1 << 20, "--max-body", min=1, metavar="BYTES", help="Maximum size of a request body."),
    timeout: float = typer.Option(
        120.0, "--timeout", min=0.1, metavar="SECONDS", help="Stop generating for a request this long after it arrives."
    ),
    connections: int = typer.Option(
        1000,
        "--connections",
        min=1,
        help="Maximum number of connections; at the limit, the connection that has been idle the longest is closed.",
    ),
    api_key: str | None = typer.Option(
        None,
        "--api-key",
        envvar="TINYLM_API_KEY",
        show_envvar=True,
        help="Require this key from clients. Other users of the machine can see options, so prefer the environment variable.",
    ),
    weights: str | None = DECODING_WEIGHTS,
    compiled: bool | None = COMPILE,
    run: str | None = RUN,
    checkpoint: str | None = CHECKPOINT,
    device: str = DEVICE,
    threads: int | None = THREADS,
    quiet: bool = QUIET,
) -> None:
    """Serve a model with an OpenAI-compatible API and a web page, until Ctrl-C.

    The routes are /v1/completions and, for a model that was fine-tuned on conversations, /v1/chat/completions. A translation model
    has /v1/translate instead.
    """
    kind = None if weights is None else checked_weights(weights)
    _check_key(api_key)
    console = stderr_console()
    opened = open_run(run, console, quiet=quiet)
    chosen = opened.checkpoint(checkpoint)
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise missing_extra("serve", "serving a model") from None
    listener = _listen(host, port)

    from tinylm.device import resolve, set_threads
    from tinylm.model.decoder import make_decoder
    from tinylm.serving.connections import ConnectionLimits, connection_limit
    from tinylm.serving.server import Access, Limits, create_app

    target = resolve(device)
    set_threads(threads)
    reporter = ConsoleReporter(console, quiet=quiet)
    allowed = connection_limit(connections)
    if allowed < connections:
        reporter.warn(f"at most {allowed} connections, because of the process's limit on open files")
    limits = Limits(max_body, max_tokens, rows, waiting, timeout, ConnectionLimits(maximum=allowed))
    local = host in LOOPBACK_HOSTS
    name = opened.path.resolve().name
    access = Access(hosts=[*LOOPBACK_HOSTS, "[::1]"] if local else ["*"], api_key=api_key)
    examples, encoder = opened.recipe.sampling.prompts, opened.chat_encoder
    if opened.recipe.objective.name == "translation":
        from tinylm.serving import translation
        from tinylm.translation.translator import Translator

        if unused := given_options(ctx, ("weights", "compiled")):
            raise InputError("has no effect on a translation model", where=", ".join(unused))
        translator = Translator.open(opened, chosen.name, device=device)
        translator.compile(reporter.note)
        asgi_app = translation.create_app(translator, name, limits=limits, access=access)
    else:
        decoder = make_decoder(opened.network(chosen, target), weights=kind, compiled=compiled, steps=None, reporter=reporter)
        asgi_app = create_app(decoder, opened.tokenizer, name, limits=limits, access=access, examples=examples, chat=encoder)
    if not local and api_key is None:
        reporter.warn(f"anyone who can connect to {host} can use the model; set --api-key to require a key")
    address = f"[{host}]" if ":" in host else host
    write_stdout(f"http://{address}:{listener.getsockname()[1]}")
    if not quiet:
        console.print_line(
            f"serving {name} {chosen.name}; for OpenAI clients, set base_url to this address + /v1; press Ctrl-C to stop", "dim"
        )
    _run(asgi_app, listener)


def _check_key(key: str | None) -> None:
    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key and key):
        raise InputError("must be a non-empty string of printable ASCII characters", where="--api-key")


def _run(asgi_app: Starlette, listener: socket.socket) -> None:
    """Serve until a signal arrives, then exit the process. Running requests have two seconds to finish. Threads are not joined."""
    import uvicorn

    from tinylm.serving.connections import RepeatFilter

    received = []

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            super().handle_exit(sig, frame)
            received.append(sig)
            timer = threading.Timer(EXIT_SECONDS, os._exit, (128 + sig,))
            timer.daemon = True
            timer.start()

    config = uvicorn.Config(
        asgi_app,
        http=asgi_app.state.connections.protocol,
        ws="none",
        log_level="warning",
        access_log=False,
        backlog=BACKLOG,
        timeout_graceful_shutdown=GRACEFUL_SECONDS,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        lifespan="on",
    )
    for name in ("asyncio", "uvicorn.error"):
        logging.getLogger(name).addFilter(RepeatFilter())
    try:
        Server(config).run(sockets=[listener])
    finally:
        if received:  # a normal exit would wait for threads, and free memory that the system frees anyway
            sys.stdout.flush()
            os._exit(128 + received[0])


def _listen(host: str, port: int) -> socket.socket:
    """Open the listening socket, so that a port in use is reported before the model is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError:
        raise InputError(f"cannot resolve {host!r}", where="--host") from None
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        raise WorkError(f"{error.strerror}", where=f"{host}:{port}", hint="choose another --port") from None
    return listener
