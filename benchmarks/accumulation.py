"""Does the gradient depend on the size of the micro-batches? Largest relative difference, fp64 and fp32, uneven targets."""

from __future__ import annotations

import torch

from tinylm.model.objective import IGNORED, CausalObjective
from tinylm.model.transformer import Transformer
from tinylm.recipe.schema import ModelSection
from tinylm.training.feed import GlobalBatch
from tinylm.training.precision import Precision
from tinylm.training.step import accumulate

SHAPES = ((1, 64), (4, 16), (16, 4))


def gradient(dtype: torch.dtype, preset: str, micro_batch_size: int) -> torch.Tensor:
    model = ModelSection.model_validate({"preset": preset, "n_layer": 2, "n_head": 4, "n_embd": 64, "context_length": 64})
    network = Transformer(model, 300, seed=1).to(dtype)
    with torch.no_grad():
        for parameter in network.parameters():  # no projection at zero: every gradient matters
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float32).to(
                dtype
            )
    sequences = torch.randint(300, (64, 65), generator=torch.Generator().manual_seed(3))
    for row in range(64):  # between 1 and 64 targets a row
        sequences[row, 2 + (row * 7) % 64 :] = IGNORED
    precision = Precision("fp32", torch.device("cpu"))
    batch = GlobalBatch(CausalObjective().example(sequences), int((sequences[:, 1:] != IGNORED).sum()))
    accumulate(network, CausalObjective(), batch, micro_batch_size, precision, precision.scaler())
    return torch.cat([parameter.grad.flatten() for parameter in network.parameters() if parameter.grad is not None])


def main() -> None:
    for dtype in (torch.float64, torch.float32):
        for preset in ("modern", "gpt2", "llama"):
            whole = gradient(dtype, preset, 64)
            for count, size in SHAPES[1:]:
                difference = (gradient(dtype, preset, size) - whole).norm() / whole.norm()
                print(f"{dtype}  {preset:7}  {count}x{size} against 1x64: relative difference {difference:.1e}")


if __name__ == "__main__":
    main()
