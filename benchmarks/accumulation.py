"""Measure how much the gradient depends on the micro-batch size, in fp64 and fp32, when rows have different numbers of targets."""

from __future__ import annotations

import torch

from tinylm.data.batch import IGNORE_INDEX
from tinylm.model.transformer import Transformer
from tinylm.recipe.schema import DecoderSection
from tinylm.training.feed import LocalBatch
from tinylm.training.objectives import CausalLM
from tinylm.training.precision import Precision
from tinylm.training.step import GradientSettings, accumulate

BATCH_SIZE = 64
MICRO_BATCH_SIZES = (16, 4)


def gradient(dtype: torch.dtype, preset: str, micro_batch_size: int) -> torch.Tensor:
    """Return the flattened gradient of one global batch."""
    model = DecoderSection.model_validate({"preset": preset, "n_layer": 2, "n_head": 4, "n_embd": 64, "context_length": 64})
    network = Transformer(model, 300, seed=1).to(dtype)
    with torch.no_grad():
        for parameter in network.parameters():  # zero-initialized projections would make most gradients zero
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float32)
            parameter += 0.02 * noise.to(dtype)
    sequences = torch.randint(300, (BATCH_SIZE, 65), generator=torch.Generator().manual_seed(3))
    for row in range(BATCH_SIZE):  # between 1 and 64 targets per row
        sequences[row, 2 + (row * 7) % 64 :] = IGNORE_INDEX
    precision = Precision("fp32", torch.device("cpu"))
    batch = LocalBatch.whole(CausalLM().batch({"tokens": sequences.numpy()}, 0, 0))
    accumulate(network, batch, GradientSettings(micro_batch_size, precision, CausalLM()))
    return torch.cat([parameter.grad.flatten() for parameter in network.parameters() if parameter.grad is not None])


def main() -> None:
    for dtype in (torch.float64, torch.float32):
        for preset in ("modern", "gpt2", "llama"):
            full_batch = gradient(dtype, preset, BATCH_SIZE)
            for size in MICRO_BATCH_SIZES:
                difference = (gradient(dtype, preset, size) - full_batch).norm() / full_batch.norm()
                sizes = f"{BATCH_SIZE // size}x{size} vs. 1x{BATCH_SIZE}"
                print(f"{dtype}  {preset:7}  {sizes}: relative gradient difference {difference:.1e}")


if __name__ == "__main__":
    main()
