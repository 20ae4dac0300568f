"""Load-test `tinylm serve` with a hostile client among many normal ones.

    python benchmarks/hostile_clients.py --run runs/quickstart [--clients 200] [--seconds 30] [--tokens 16] [--rounds 2]

In each round, the script measures the latency of normal clients and the memory of the server, with and without the hostile client,
which runs in its own process. The hostile client sends invalid requests and requests with long stop strings, with regular
expressions that have huge automata, or with biases that ban every allowed token. At the same time, it holds slow connections open.
Finally, the script sends SIGTERM to the server and measures how long the server takes to exit.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx

SLOW_CONNECTIONS = 300
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
EXPRESSIONS = (
    "(?:){4294967294}",
    "(?:|){4294967294}",
    "(a?){9000}",
    "a?" * 9000,
    "[ -~]{0,9000}",
    "(a|b)*a(a|b){20}",
    r"(\w{1,30} ){1,20}",
    "a{99999999999}",
    "(" * 3000 + "a" + ")" * 3000,
)


def hostile_bodies() -> Iterator[dict[str, Any]]:
    """Yield requests that are invalid or expensive. No two regular expressions are equal, so none is cached."""
    for turn in itertools.count():
        yield {"prompt": "a", "regex": "a", "logit_bias": {str(id): -100 for id in range(300)}}
        yield {"prompt": "The cat", "max_tokens": 50, "stop": "z" * 900_000}
        yield {"prompt": "The cat", "max_tokens": 50, "stop": [f"{number}" for number in range(100_000)]}
        yield {"prompt": "The cat", "max_tokens": 50, "stop": [" " + "e" * 900 + str(number) for number in range(16)]}
        for expression in EXPRESSIONS:
            yield {"prompt": "a", "regex": f"{expression}{turn}"}
        for number in range(12):
            biases = {str(id): (id + number) % 7 for id in range(300)}
            yield {"prompt": "The", "max_tokens": 50, "logit_bias": biases, "temperature": 1 + number / 10}
        yield {"prompt": "a", "logit_bias": {"²": 1}}
        yield {"prompt": "a", "logit_bias": {"1" * 5000: 1}}


async def send_hostile_requests(address: str, statuses: Counter[int]) -> None:
    """Send hostile requests, 16 at a time, until canceled."""
    bodies = hostile_bodies()
    async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=16)) as session:

        async def client() -> None:
            while True:
                try:
                    statuses[(await session.post(f"{address}/v1/completions", json=next(bodies))).status_code] += 1
                except httpx.HTTPError:
                    await asyncio.sleep(0.1)

        await asyncio.gather(*(client() for _ in range(16)))


async def hold_slow_connections(address: str) -> None:
    """Hold open connections that send their headers or bodies slowly. Replace each connection that the server closes."""
    url = urlsplit(address)
    head = HEAD + b"Content-Length: 1000\r\n"

    async def hold(number: int) -> None:
        while True:
            try:
                reader, writer = await asyncio.open_connection(url.hostname, url.port)
                writer.write(head if number % 2 else head + b"\r\n{")
                while not reader.at_eof():
                    writer.write(b"X" if number % 2 else b" ")
                    try:
                        await asyncio.wait_for(reader.read(100), 1)
                    except asyncio.TimeoutError:
                        continue
                writer.close()
            except OSError:
                await asyncio.sleep(0.1)

    await asyncio.gather(*(hold(number) for number in range(SLOW_CONNECTIONS)))


async def run_hostile(address: str) -> None:
    """Run all attacks at the same time until SIGTERM. Then print the number of responses by status."""
    statuses: Counter[int] = Counter()
    tasks = asyncio.gather(send_hostile_requests(address, statuses), hold_slow_connections(address))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, tasks.cancel)
    try:
        await tasks
    except asyncio.CancelledError:
        print(json.dumps(statuses))


async def post(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: dict[str, Any]) -> int:
    """Send a request on an open connection and return the status. An HTTP library would need more CPU time than the server."""
    data = json.dumps(body).encode()
    writer.write(HEAD + b"Content-Length: %d\r\n\r\n" % len(data) + data)
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    await reader.readexactly(int(head.partition(b"content-length:")[2].split(b"\r\n")[0]))
    return int(head.split(b" ", 2)[1])


async def measure(address: str, clients: int, seconds: float, tokens: int) -> tuple[list[float], Counter[int]]:
    """Send requests as normal clients. Return the sorted latencies in seconds and the number of responses by status."""
    url = urlsplit(address)
    latencies: list[float] = []
    statuses: Counter[int] = Counter()
    end = time.perf_counter() + seconds

    async def client(number: int) -> None:
        connection = None
        while (start := time.perf_counter()) < end:
            try:
                connection = connection or await asyncio.open_connection(url.hostname, url.port)
                status = await asyncio.wait_for(post(*connection, {"prompt": f"Client {number}", "max_tokens": tokens}), 120)
            except (OSError, EOFError, asyncio.TimeoutError):
                status, connection = 0, None
            statuses[status] += 1
            latencies.append(time.perf_counter() - start)
        if connection is not None:
            connection[1].close()

    await asyncio.gather(*(client(number) for number in range(clients)))
    return sorted(latencies), statuses


def report(name: str, latencies: list[float], statuses: Counter[int], seconds: float, memory: float) -> None:
    p50, p99 = latencies[len(latencies) // 2], latencies[int(0.99 * len(latencies))]
    print(
        f"{name}: {len(latencies) / seconds:.0f} requests/s, median latency {p50:.2f} s, p99 latency {p99:.2f} s, "
        f"responses by status {dict(statuses)}, server memory {memory:.0f} MB",
        flush=True,
    )


def resident_megabytes(process: subprocess.Popen[str]) -> float:
    """Return the resident memory of a process in MB (Linux only)."""
    with open(f"/proc/{process.pid}/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--attack", metavar="ADDRESS", help="attack the server at ADDRESS until SIGTERM")
    options = parser.parse_args()
    if options.attack:
        asyncio.run(run_hostile(options.attack))
        return
    command = [sys.executable, "-m", "tinylm", "serve", "--run", options.run, "--port", "0", "--quiet"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            address = server.stdout.readline().strip()
            if not address:
                sys.exit("the server did not start")
            asyncio.run(measure(address, 8, 3, options.tokens))  # warm up
            print(f"server memory after the warm-up: {resident_megabytes(server):.0f} MB", flush=True)
            for name, hostile in (("without the hostile client", False), ("with the hostile client", True)) * options.rounds:
                attacker = None
                if hostile:
                    attacker = subprocess.Popen([sys.executable, __file__, "--attack", address], stdout=subprocess.PIPE, text=True)
                    time.sleep(3)
                latencies, statuses = asyncio.run(measure(address, options.clients, options.seconds, options.tokens))
                report(name, latencies, statuses, options.seconds, resident_megabytes(server))
                if attacker is not None:
                    attacker.terminate()
                    print("  responses to the hostile client by status:", attacker.communicate()[0].strip(), flush=True)
            print("  health:", httpx.get(f"{address}/health", timeout=30).text)
            attacker = subprocess.Popen([sys.executable, __file__, "--attack", address], stdout=subprocess.DEVNULL)
            time.sleep(5)
            start = time.perf_counter()
            server.terminate()
            server.wait(60)
            print(f"SIGTERM during an attack: the server exited after {time.perf_counter() - start:.1f} s")
            attacker.kill()
            attacker.wait()
        finally:
            server.kill()


if __name__ == "__main__":
    main()
