"""Load-test `tinylm serve` with 64 concurrent clients on the same machine: correctness and latency.

    python benchmarks/serving.py --run runs/quickstart [--clients 64] [--requests 3] [--tokens 32]

The script starts `tinylm serve` in a separate process. Every client sends its requests sequentially, each with a different seed.
Every response is compared with the text that the library generates with the same seed. Then half as many clients start streams and
disconnect, and the script measures the time until the server is idle.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import time

import httpx
import torch

from tinylm.generation.engine import Request, generate_batch, sample_seed
from tinylm.generation.sampling import SamplingOptions
from tinylm.model.decoder import make_decoder
from tinylm.reporting import SILENT
from tinylm.run import Run


async def send_requests(address: str, clients: int, requests: int, tokens: int) -> tuple[dict[int, str], list[float], int]:
    """Return the generated texts by seed, the latency of each request in seconds, and the number of failed requests."""
    texts: dict[int, str] = {}
    seconds: list[float] = []
    failed = 0
    async with httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_connections=clients)) as session:

        async def client(number: int) -> None:
            nonlocal failed
            for turn in range(requests):
                seed = number * requests + turn
                start = time.perf_counter()
                body = {"prompt": f"Client {number}", "max_tokens": tokens, "seed": seed}
                response = await session.post(f"{address}/v1/completions", json=body)
                seconds.append(time.perf_counter() - start)
                if response.status_code == 200:
                    texts[seed] = response.json()["choices"][0]["text"]
                else:
                    failed += 1

        await asyncio.gather(*(client(number) for number in range(clients)))
    return texts, seconds, failed


async def disconnect_during_stream(address: str, clients: int) -> float:
    """Start long streams, disconnect, and return the seconds until the server is idle."""
    async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=clients + 1)) as session:

        async def client() -> None:
            body = {"prompt": "x", "max_tokens": 2000, "stream": True}
            async with session.stream("POST", f"{address}/v1/completions", json=body) as response:
                async for _ in response.aiter_bytes():
                    return

        await asyncio.gather(*(client() for _ in range(clients)))
        start = time.perf_counter()
        while True:
            load = (await session.get(f"{address}/health")).json()
            if load["generating"] == load["waiting"] == 0:
                return time.perf_counter() - start
            await asyncio.sleep(0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32)
    options = parser.parse_args()
    command = [sys.executable, "-m", "tinylm", "serve", "--run", options.run, "--port", "0", "--quiet"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            while True:
                try:
                    httpx.get(f"{address}/health")
                    break
                except httpx.TransportError:
                    time.sleep(0.2)
            start = time.perf_counter()
            texts, seconds, failed = asyncio.run(send_requests(address, options.clients, options.requests, options.tokens))
            total = time.perf_counter() - start
            idle_after = asyncio.run(disconnect_during_stream(address, options.clients // 2))
        finally:
            process.terminate()
    run = Run.open(options.run)
    network = run.network(run.checkpoint(), torch.device("cpu"))
    decoder = make_decoder(network, weights="fp32", compiled=None, steps=None, reporter=SILENT)  # as in the server
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
    print(f"after {options.clients // 2} clients disconnected during a stream: server idle within {idle_after:.2f} s")


if __name__ == "__main__":
    main()
