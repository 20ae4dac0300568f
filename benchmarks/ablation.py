"""Ablation of the `modern` preset: change one part at a time, over several seeds.

    python benchmarks/ablation.py SOURCE [--recipe shakespeare-char] [--steps 400] [--seeds 3] [--only NAME ...] [--set K=V ...]

With `--recipe masked-docs`, the preset is that of encoders, and the variants include other mask rates.
The script prints the held-out loss of the baseline. For each variant, it prints the mean loss difference from the baseline with
the same seed, the standard error of this mean, and the ratio of the training times (variant / baseline). Differences below two
standard errors are not significant. Other load on the machine affects the times but not the losses.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
from pathlib import Path

from tinylm import pipeline
from tinylm.recipe import load

RECIPES = Path(__file__).parents[1] / "recipes"
VARIANTS: dict[str, tuple[str, ...]] = {
    "learned positions instead of RoPE": ("model.position=learned",),
    "without QK-norm": ("model.qk_norm=off",),
    "QK-norm without gain": ("model.qk_gain=off",),
    "layer norm instead of RMS norm": ("model.norm=layernorm",),
    "norms without gain": ("model.norm_gain=off",),
    "GELU instead of ReLU squared": ("model.feed_forward=gelu",),
    "SwiGLU instead of ReLU squared": ("model.feed_forward=swiglu", "model.feed_forward_multiple=2.6667"),
    "without zero-initialized outputs": ("model.zero_init_outputs=off",),
    "without embedding norm": ("model.embedding_norm=off",),
    "tied head": ("model.tie_embeddings=on",),
    "logit soft-cap 15": ("model.logit_softcap=15",),
    "value residual": ("model.value_residual=on",),
    "value embeddings, first and last block": ("model.value_embeddings=1",),
    "embedding shortcut": ("model.embedding_shortcut=on",),
    "parallel residual": ("model.parallel_residual=on",),
    "keys of one head shifted by a position": ("model.shifted_key_heads=1",),
    "n-grams [2, 3]": ("model.ngram_embeddings=[2, 3]",),
    "n-grams [2, 3, 4, 5, 6]": ("model.ngram_embeddings=[2, 3, 4, 5, 6]",),
    "without n-grams": ("model.ngram_embeddings=[]",),
    "Muon: five classic Newton-Schulz iterations": (
        "training.optimizer.newton_schulz=classic",
        "training.optimizer.newton_schulz_steps=5",
    ),
    "Muon: cautious weight decay": ("training.optimizer.cautious_weight_decay=on",),
    "Muon: no weight decay": ("training.optimizer.weight_decay=0",),
    "Muon: momentum warmup over 100 steps": ("training.optimizer.momentum_warmup=100",),
    "AdamW instead of Muon, lr 2e-3": ("training.optimizer={name: adamw, lr: 2e-3}",),
    "AdamW instead of Muon, lr 5e-3": ("training.optimizer={name: adamw, lr: 5e-3}",),
}
MASKED_VARIANTS: dict[str, tuple[str, ...]] = {
    "mask rate 0.15": ("objective.rate=0.15",),
    "mask rate 0.3": ("objective.rate=0.3",),
    "mask rate 0.3 to 0.15": ("objective.rate=[0.3, 0.15]",),
    "always [MASK]": ("objective.replace={mask: 1.0, random: 0.0, keep: 0.0}",),
}


def recipe_path(recipe: str) -> Path:
    path = RECIPES / f"{recipe}.yaml"
    return path if path.exists() else Path(recipe)


def train(recipe: str, settings: list[str]) -> tuple[float, float]:
    """Train once and return (held-out loss, training time in seconds)."""
    settings = ["evaluation.every=1000000", "checkpoint.every=1000000", "sampling.every=null", *settings]
    with tempfile.TemporaryDirectory() as folder:
        result = pipeline.train(load(recipe_path(recipe), settings), Path(folder, "run"), device="cpu")
    loss = result.metrics["loss"]
    assert loss is not None
    return loss, result.train_seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--recipe", default="shakespeare-char")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="run only variants whose name contains one of these strings")
    parser.add_argument("--set", action="append", default=[], dest="settings")
    arguments = parser.parse_args()
    if not arguments.source.startswith("builtin:") and not Path(arguments.source).exists():
        sys.exit(f"error: {arguments.source} does not exist")
    common = [f"data.train={arguments.source}", f"training.steps={arguments.steps}", *arguments.settings]
    seeds = range(1337, 1337 + arguments.seeds)
    baseline = [train(arguments.recipe, [*common, f"seed={seed}"]) for seed in seeds]
    losses = [loss for loss, _ in baseline]
    deviation = statistics.stdev(losses) if len(losses) > 1 else 0.0
    print(
        f"baseline: loss {statistics.mean(losses):.4f} (standard deviation {deviation:.4f}), training time {baseline[0][1]:.1f} s",
        flush=True,
    )
    is_masked = load(recipe_path(arguments.recipe), common).objective.name == "masked_lm"
    variants = VARIANTS | (MASKED_VARIANTS if is_masked else {})
    print("\nloss difference from the baseline (mean +- standard error) and training time (variant / baseline)")
    for name, variant in variants.items():
        if arguments.only and not any(word in name for word in arguments.only):
            continue
        results = [train(arguments.recipe, [*common, *variant, f"seed={seed}"]) for seed in seeds]
        differences = [loss - base for (loss, _), (base, _) in zip(results, baseline, strict=True)]
        error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
        ratio = statistics.median(seconds / base for (_, seconds), (_, base) in zip(results, baseline, strict=True))
        print(f"{name:40} loss {statistics.mean(differences):+.4f} +- {error:.4f}   time {ratio:.2f}", flush=True)


if __name__ == "__main__":
    main()
