"""`tinylm serve`: serve a model over HTTP."""

from __future__ import annotations

import socket

import typer

from tinylm.errors import InputError, WorkError, missing_extra

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
    stderr_console,
    write_stdout,
)

app = typer.Typer(add_completion=False)
LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")


@app.command()
def serve(
    host: str = typer.Option(
        "127.0.0.1", "--host", help="Address to listen on. Any address except loopback can be reached from the network."
    ),
    port: int = typer.Option(8000, "--port", min=0, max=65535, help="Port to listen on; 0 picks a free one."),
    rows: int = typer.Option(16, "--rows", min=1, max=1024, help="Maximum number of samples generated at the same time."),
    waiting: int = typer.Option(
        256, "--waiting", min=1, help="Maximum number of samples in the queue; further requests get status 429."
    ),
    max_tokens: int = typer.Option(2048, "--max-tokens", min=1, help="Maximum max_tokens of a request."),
    max_body: int = typer.Option(1 << 20, "--max-body", min=1, metavar="BYTES", help="Maximum size of a request body."),
    timeout: float = typer.Option(
        120.0, "--timeout", min=0.1, metavar="SECONDS", help="Time from the arrival of a request until its samples are stopped."
    ),
    weights: str = WEIGHTS,
    compiled: bool | None = COMPILE,
    run: str | None = RUN,
    checkpoint: str | None = CHECKPOINT,
    device: str = DEVICE,
    threads: int | None = THREADS,
    quiet: bool = QUIET,
) -> None:
    """Serve a model with an OpenAI-compatible /v1/completions API and a web page, until Ctrl-C."""
    kind = checked_weights(weights)
    console = stderr_console()
    opened = open_run(run, console, quiet=quiet)
    chosen = opened.checkpoint(checkpoint)
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError:
        raise missing_extra("serve", "serving a model") from None
    listener = _listen(host, port)

    from tinylm.device import resolve, set_threads
    from tinylm.model.decoder import make_decoder
    from tinylm.serving.server import Limits, create_app

    target = resolve(device)
    set_threads(threads)
    reporter = ConsoleReporter(console, quiet=quiet)
    decoder = make_decoder(opened.network(chosen, target), weights=kind, compiled=compiled, steps=None, reporter=reporter)
    limits = Limits(max_body_bytes=max_body, max_tokens=max_tokens, rows=rows, queue_size=waiting, timeout=timeout)
    local = host in LOOPBACK_HOSTS
    name = opened.path.resolve().name
    asgi_app = create_app(decoder, opened.tokenizer, name, limits=limits, hosts=[*LOOPBACK_HOSTS, "[::1]"] if local else ["*"])
    if not local:
        reporter.warn(f"anyone who can connect to {host} can use the model; there is no authentication")
    address = f"[{host}]" if ":" in host else host
    write_stdout(f"http://{address}:{listener.getsockname()[1]}")
    if not quiet:
        console.print_line(
            f"serving {name} {chosen.name}; for OpenAI clients, set base_url to this address + /v1; press Ctrl-C to stop", "dim"
        )
    config = uvicorn.Config(asgi_app, log_level="warning", access_log=False, timeout_graceful_shutdown=2, lifespan="on")
    uvicorn.Server(config).run(sockets=[listener])


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
        listener.listen(1024)
    except OSError as error:
        raise WorkError(f"{error.strerror}", where=f"{host}:{port}", hint="choose another --port") from None
    return listener
