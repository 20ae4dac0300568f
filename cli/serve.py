"""`tinylm serve`: a model behind an address."""

from __future__ import annotations

import socket

import typer

from tinylm.errors import InputError, WorkError, need_extra

from .console import (
    CHECKPOINT,
    COMPILE,
    DEVICE,
    QUIET,
    RUN,
    THREADS,
    WEIGHTS,
    ConsoleReporter,
    checked_weights,
    open_run,
    out,
    stderr,
)

app = typer.Typer(add_completion=False)
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@app.command()
def serve(
    host: str = typer.Option(
        "127.0.0.1", "--host", help="The address to listen on; another than loopback opens it to the network."
    ),
    port: int = typer.Option(8000, "--port", min=0, max=65535, help="0: any that is free."),
    rows: int = typer.Option(16, "--rows", min=1, max=1024, help="Samples written at the same time."),
    waiting: int = typer.Option(256, "--waiting", min=1, help="Samples that may wait; more are answered 429."),
    max_tokens: int = typer.Option(2048, "--max-tokens", min=1, help="The most a request may ask for."),
    max_body: int = typer.Option(1 << 20, "--max-body", min=1, metavar="BYTES", help="The largest body."),
    timeout: float = typer.Option(120.0, "--timeout", min=0.1, metavar="SECONDS", help="A sample is given up after that."),
    weights: str = WEIGHTS,
    compiled: bool | None = COMPILE,
    run: str | None = RUN,
    checkpoint: str | None = CHECKPOINT,
    device: str = DEVICE,
    threads: int | None = THREADS,
    quiet: bool = QUIET,
) -> None:
    """Serve a model: OpenAI's /v1/completions, and a page to play with, until Ctrl-C."""
    kind = checked_weights(weights)
    console = stderr()
    opened = open_run(run, console, quiet=quiet)
    chosen = opened.checkpoint(checkpoint)
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError:
        raise need_extra("serve", "serving a model") from None
    listening = _listening(host, port)

    from tinylm.device import resolve, set_threads
    from tinylm.model.decoder import prepared
    from tinylm.serving.server import Limits, application

    target = resolve(device)
    set_threads(threads)
    reporter = ConsoleReporter(console, quiet=quiet)
    decoder = prepared(opened.network(chosen, target), weights=kind, compiled=compiled, steps=None, reporter=reporter)
    limits = Limits(max_body, max_tokens, rows, waiting, timeout)
    local = host in LOOPBACK
    name = opened.path.resolve().name
    application_ = application(decoder, opened.tokenizer, name, limits=limits, hosts=[*LOOPBACK, "[::1]"] if local else ["*"])
    if not local:
        reporter.warn(f"anyone who can reach {host} can use the model: there is no password")
    address = f"[{host}]" if ":" in host else host
    out(f"http://{address}:{listening.getsockname()[1]}")
    if not quiet:
        console.say(f"serving {name} {chosen.name}; OpenAI clients take base_url = that address + /v1; Ctrl-C stops", "dim")
    config = uvicorn.Config(application_, log_level="warning", access_log=False, timeout_graceful_shutdown=2, lifespan="on")
    uvicorn.Server(config).run(sockets=[listening])


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens, so that a port in use is told before the model is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError:
        raise InputError(f"no such address {host!r}", where="--host") from None
    listening = socket.socket(family, kind, protocol)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
        listening.listen(1024)
    except OSError as error:
        raise WorkError(f"{error.strerror}", where=f"{host}:{port}", hint="another --port?") from None
    return listening
