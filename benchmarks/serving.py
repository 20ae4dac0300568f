"""Load-test `tinylm serve` with 64 concurrent clients on the same machine: correctness and latency.

    python benchmarks/serving.py --run runs/quickstart [--device cuda] [--clients 64] [--requests 3] [--tokens 32]

The script starts `tinylm serve` in a fork of its own process. Every client sends its requests sequentially, each with a different
seed. Every response is compared with the text that the library generates with the same seed. On a GPU, some texts can differ,
because the number of rows affects rounding. Then half as many clients start streams and disconnect, and the script measures the
time until the server is idle. The exit code is 1 if a request fails. The clients need only Python's standard library.
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import os
import runpy
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from tinylm.device import resolve
from tinylm.generation.engine import Request, generate_batch, sample_seed
from tinylm.generation.sampling import SamplingOptions
from tinylm.model.decoder import make_decoder
from tinylm.reporting import SILENT
from tinylm.run import Run


def serve(options: Sequence[str], output: int) -> None:
    """Run `tinylm serve` with its standard output redirected to a file descriptor."""
    os.dup2(output, 1)
    sys.argv = ["tinylm", "serve", *options]
    runpy.run_module("tinylm", run_name="__main__")


def connect(address: str) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(urlsplit(address).netloc, timeout=300)


def request(connection: http.client.HTTPConnection, path: str, body: dict[str, Any] | None = None) -> http.client.HTTPResponse:
    content = None if body is None else json.dumps(body)
    connection.request("GET" if body is None else "POST", path, content, {"Content-Type": "application/json"})
    return connection.getresponse()


def send_requests(address: str, clients: int, requests: int, tokens: int) -> tuple[dict[int, str], list[float], int]:
    """Return the generated texts by seed, the latency of each request in seconds, and the number of failed requests."""
    texts: dict[int, str] = {}
    seconds: list[float] = []
    failed = [0] * clients
    start_together = threading.Barrier(clients)

    def client(number: int) -> None:
        connection = connect(address)
        start_together.wait()
        for turn in range(requests):
            seed = number * requests + turn
            start = time.perf_counter()
            response = request(connection, "/v1/completions", {"prompt": f"Client {number}", "max_tokens": tokens, "seed": seed})
            answer = response.read()
            seconds.append(time.perf_counter() - start)
            if response.status == 200:
                texts[seed] = json.loads(answer)["choices"][0]["text"]
            else:
                failed[number] += 1
        connection.close()

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))
    return texts, seconds, sum(failed)


def disconnect_during_stream(address: str, clients: int) -> float:
    """Start long streams, disconnect, and return the seconds until the server is idle."""

    def client(_: int) -> None:
        connection = connect(address)
        response = request(connection, "/v1/completions", {"prompt": "x", "max_tokens": 2000, "stream": True})
        response.read(1)
        response.close()
        connection.close()

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))
    connection, start = connect(address), time.perf_counter()
    while True:
        load = json.loads(request(connection, "/health").read())
        if load["generating"] == load["waiting"] == 0:
            return time.perf_counter() - start
        time.sleep(0.01)


def wait_until_ready(address: str) -> None:
    while True:
        try:
            request(connect(address), "/health").read()
            return
        except OSError:
            time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--no-compile", action="store_true", help="serve and compare without compiled decoding")
    options = parser.parse_args()
    arguments = ["--run", options.run, "--device", options.device, "--port", "0", "--quiet"]
    arguments += ["--no-compile"] if options.no_compile else []
    reader, writer = os.pipe()
    server = multiprocessing.get_context("fork").Process(target=serve, args=(arguments, writer))
    server.start()
    os.close(writer)
    try:
        with open(reader) as output:
            address = output.readline().strip()
        if not address:
            sys.exit("`tinylm serve` has not started")
        wait_until_ready(address)
        start = time.perf_counter()
        texts, seconds, failed = send_requests(address, options.clients, options.requests, options.tokens)
        total = time.perf_counter() - start
        idle_after = disconnect_during_stream(address, max(1, options.clients // 2))
    finally:
        server.terminate()
        server.join()
    run, device = Run.open(options.run), resolve(options.device)
    network = run.network(run.checkpoint(), device)
    decoder = make_decoder(  # as in the server
        network, weights=None, compiled=False if options.no_compile else None, steps=None, reporter=SILENT
    )
    settings = SamplingOptions(max_new_tokens=options.tokens, temperature=1.0, top_k=None)
    seeds = sorted(texts)
    requests = [Request(f"Client {seed // options.requests}", settings, sample_seed(seed, 0)) for seed in seeds]
    samples = generate_batch(decoder, run.tokenizer, requests)
    wrong = sum(sample.text != texts[seed] for seed, sample in zip(seeds, samples, strict=True))
    seconds.sort()
    print(
        f"{len(texts)} responses to {options.clients} clients in {total:.1f} s: "
        f"{failed} requests failed, {wrong} responses differ from the library's text"
    )
    print(
        f"latency: median {statistics.median(seconds):.2f} s, p90 {seconds[int(0.9 * len(seconds))]:.2f} s, "
        f"p99 {seconds[int(0.99 * len(seconds))]:.2f} s; {len(texts) * options.tokens / total:.0f} tokens/s"
    )
    print(f"after {max(1, options.clients // 2)} clients disconnected during a stream: server idle within {idle_after:.2f} s")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
