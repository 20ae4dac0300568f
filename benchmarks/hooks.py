"""Measure the cost of unused hook points by alternating training steps with and without them.

    python benchmarks/hooks.py [--steps 200] [--width 64] [--rows 8] [--compile]

Both networks have the same weights and train on the same batches, on one thread. One of them has plain functions in place of the
hook points. The script prints the median CPU time per step with and without hook points, and the median ratio of the two times,
plus or minus two standard errors. The default shape is tiny, so that module calls account for much of each step.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor

from tinylm.model.hooks import HookPoint
from tinylm.model.transformer import Transformer
from tinylm.recipe.schema import DecoderSection

VOCABULARY = 512


class NoHookPoint:
    """A replacement for a hook point that costs about as much as a function call."""

    functions = ()

    def __new__(cls, x: Tensor) -> Tensor:
        return x


def build(model: DecoderSection, compiled: bool) -> Transformer:
    network = Transformer(model, VOCABULARY)
    if compiled:
        for unit in network.compile_units():
            unit.compile(dynamic=False)
    return network


def remove_hook_points(network: Transformer) -> None:
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, HookPoint):
                delattr(parent, name)
                setattr(parent, name, NoHookPoint)


def step(network: Transformer, parameters: list[Tensor], tokens: Tensor) -> float:
    """Return the CPU time of a forward pass, a backward pass, and an update."""
    start = time.process_time()
    for parameter in parameters:
        parameter.grad = None
    network(tokens[:, :-1], targets=tokens[:, 1:]).backward()
    with torch.no_grad():
        torch._foreach_sub_(parameters, [parameter.grad for parameter in parameters], alpha=1e-6)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--compile", action="store_true", help="compile the blocks")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shape = {"n_layer": arguments.layers, "n_head": 4, "n_embd": arguments.width, "context_length": arguments.context}
    for preset in ("modern", "gpt2", "llama"):
        model = DecoderSection.model_validate({"preset": preset, **shape})
        networks = [build(model, arguments.compile) for _ in range(2)]
        remove_hook_points(networks[1])
        parameters = [list(network.parameters()) for network in networks]
        generator = torch.Generator().manual_seed(0)
        times: list[tuple[float, float]] = []
        for number in range(arguments.steps + 10):
            tokens = torch.randint(VOCABULARY, (arguments.rows, arguments.context + 1), generator=generator)
            order = (0, 1) if number % 2 else (1, 0)
            pair = {index: step(networks[index], parameters[index], tokens) for index in order}
            if number >= 10:  # the first ten steps are warmup
                times.append((pair[0], pair[1]))
        ratios = [present / absent for present, absent in times]
        error = 1.25 * statistics.stdev(ratios) / len(ratios) ** 0.5  # standard error of the median
        present, absent = (statistics.median(column) * 1e3 for column in zip(*times, strict=True))
        ratio = statistics.median(ratios)
        times_text = f"with {present:7.2f} ms   without {absent:7.2f} ms"
        print(f"{preset:8} {times_text}   ratio (with / without) {ratio:.4f} ± {2 * error:.4f}", flush=True)


if __name__ == "__main__":
    main()
