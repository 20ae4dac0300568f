"""A server under 64 clients at once on loopback: are the answers right, and how long do they take?

    python benchmarks/serving.py --run runs/quickstart [--clients 64] [--requests 3] [--tokens 32]

Starts `tinylm serve` in a process of its own. Every client sends its requests one after the other with seeds of its own; each
answer is compared with what the library writes for that seed. Then half of the clients leave in the middle of a stream, and
the time until no place is taken any more is measured.
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

from tinylm.generation.engine import Request, sample_seed, write
from tinylm.generation.sampling import SamplingOptions
from tinylm.model.decoder import prepared
from tinylm.reporting import SILENT
from tinylm.run import Run


async def ask(address: str, clients: int, requests: int, tokens: int) -> tuple[dict[int, str], list[float], int]:
    """Texts by seed, seconds of each request, and how many failed."""
    texts: dict[int, str] = {}
    seconds: list[float] = []
    failed = 0
    async with httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_connections=clients)) as session:

        async def client(number: int) -> None:
            nonlocal failed
            for turn in range(requests):
                seed = number * requests + turn
                begun = time.perf_counter()
                body = {"prompt": f"Client {number}", "max_tokens": tokens, "seed": seed}
                answer = await session.post(f"{address}/v1/completions", json=body)
                seconds.append(time.perf_counter() - begun)
                if answer.status_code == 200:
                    texts[seed] = answer.json()["choices"][0]["text"]
                else:
                    failed += 1

        await asyncio.gather(*(client(number) for number in range(clients)))
    return texts, seconds, failed


async def leave(address: str, clients: int) -> float:
    """Seconds until the server is idle after clients who had begun a long stream have left."""
    async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=clients + 1)) as session:

        async def one() -> None:
            body = {"prompt": "x", "max_tokens": 2000, "stream": True}
            async with session.stream("POST", f"{address}/v1/completions", json=body) as answer:
                async for _ in answer.aiter_bytes():
                    return

        await asyncio.gather(*(one() for _ in range(clients)))
        begun = time.perf_counter()
        while True:
            load = (await session.get(f"{address}/health")).json()
            if load["writing"] == load["waiting"] == 0:
                return time.perf_counter() - begun
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
            begun = time.perf_counter()
            texts, seconds, failed = asyncio.run(ask(address, options.clients, options.requests, options.tokens))
            whole = time.perf_counter() - begun
            freed = asyncio.run(leave(address, options.clients // 2))
        finally:
            process.terminate()
    run = Run.open(options.run)
    network = run.network(run.checkpoint(), torch.device("cpu"))
    decoder = prepared(network, weights="fp32", compiled=None, steps=None, reporter=SILENT)  # as the server has it
    settings = SamplingOptions(max_new_tokens=options.tokens, temperature=1.0, top_k=None)
    seeds = sorted(texts)
    requests = [Request(f"Client {seed // options.requests}", settings, sample_seed(seed, 0)) for seed in seeds]
    wrong = sum(sample.text != texts[seed] for seed, sample in zip(seeds, write(decoder, run.tokenizer, requests), strict=True))
    seconds.sort()
    print(
        f"{len(texts)} answers to {options.clients} clients in {whole:.1f} s, {failed} failed, {wrong} not what the library writes"
    )
    print(
        f"latency: median {statistics.median(seconds):.2f} s, p90 {seconds[int(0.9 * len(seconds))]:.2f} s, "
        f"p99 {seconds[int(0.99 * len(seconds))]:.2f} s; {len(texts) * options.tokens / whole:.0f} tokens/s"
    )
    print(f"{options.clients // 2} clients left in the middle: idle again after {freed:.2f} s")


if __name__ == "__main__":
    main()
