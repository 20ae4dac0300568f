"""Test the estimate of the memory required for training, and the choice of the largest micro-batch that fits."""

from __future__ import annotations

import pytest
from planning import plan, recipe

from tinylm.cost.micro_batch import choose_micro_batch, estimate_memory
from tinylm.cost.parameters import parameter_counts
from tinylm.errors import InputError


@pytest.mark.parametrize("batch", [1, 2, 7, 12, 64, 96])
@pytest.mark.parametrize("mebibytes", [1, 30, 300, 3000, 100_000])
@pytest.mark.parametrize("half", [True, False])
def test_the_micro_batch_is_the_largest_divisor_of_the_batch_that_fits(batch: int, mebibytes: int, half: bool) -> None:
    loaded = recipe(f"training.global_batch_size={batch}")
    limit = mebibytes << 20
    chosen = choose_micro_batch(loaded, 4096, limit, None, half=half)
    assert batch % chosen == 0

    def fits(size: int) -> bool:
        costs = estimate_memory(loaded, 4096, size, precision="bf16" if half else "fp32", on_gpu=True)
        return costs.weights + costs.gradients + costs.optimizer + costs.activations <= 0.6 * limit

    assert fits(chosen) or chosen == 1
    assert not any(fits(size) for size in range(chosen + 1, batch + 1) if batch % size == 0)


def test_the_micro_batch_size_can_be_set_or_limited_by_a_number_of_tokens() -> None:
    assert choose_micro_batch(recipe("training.micro_batch_size=16"), 4096, 1, None) == 16
    assert choose_micro_batch(recipe(), 4096, 1 << 40, 4096) == 16
    assert choose_micro_batch(recipe("model.context_length=8192"), 4096, 1 << 40, 4096) == 1
    assert choose_micro_batch(recipe(), 4096, 1 << 40, None, devices=4) == 16


def test_muon_stores_one_value_per_matrix_weight_and_adamw_stores_two() -> None:
    muon, adamw = (estimate_memory(recipe(f"training.optimizer={name}"), 300, 1) for name in ("muon", "adamw"))
    assert adamw.optimizer == 2 * adamw.weights
    assert adamw.optimizer - muon.optimizer == 4 * parameter_counts(recipe().model, 300)["matrices"]
    assert adamw.update == 0 < muon.update


def test_total_memory_is_the_peak_on_a_gpu_and_the_resident_set_on_a_cpu() -> None:
    for accumulates in (True, False):
        gpu = estimate_memory(recipe(), 300, 4, on_gpu=True, accumulates=accumulates)
        gradients = gpu.gradients if accumulates else 0
        peaks = (gradients + gpu.activations, gpu.gradients + gpu.update, gpu.gradients + gpu.evaluation)
        assert gpu.total == gpu.weights + gpu.optimizer + max(peaks)
    cpu = estimate_memory(recipe(), 300, 4)
    assert cpu.total > cpu.weights + cpu.optimizer + cpu.gradients + cpu.activations + cpu.evaluation


def test_with_a_large_vocabulary_an_evaluation_needs_more_memory_than_a_training_step() -> None:
    costs = estimate_memory(recipe("model.n_layer=1"), 50_000, 1, on_gpu=True)
    assert costs.evaluation > costs.activations
    assert costs.evaluation < 2 * (1 << 25) * 4 * 1.05, "logits and their log-softmax, 128 MiB each"


def test_the_error_for_a_batch_that_cannot_be_divided_suggests_valid_sizes() -> None:
    message = r"global_batch_size: 64 sequences cannot be divided among 3 devices \(use 63 or 66\)"
    with pytest.raises(InputError, match=message):
        plan(accelerator="l4", devices=3)
    with pytest.raises(InputError, match=r"2 sequences cannot be divided among 8 devices \(use 8\)"):
        plan("training.global_batch_size=2", accelerator="l4", devices=8)
    with pytest.raises(InputError, match=r"16 does not divide the 8 sequences per device \(use 1, 2, 4 or 8\)"):
        plan("training.micro_batch_size=16", accelerator="l4", devices=8)


def test_more_memory_allows_larger_micro_batches() -> None:
    large = ["model.n_layer=24", "model.n_embd=1024", "model.n_head=16", "model.context_length=1024"]
    sizes = [plan(*large, accelerator=name).micro_batch_size for name in ("t4", "a100-40gb-sxm", "b200")]
    assert sizes == sorted(set(sizes))
