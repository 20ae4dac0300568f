"""Data parallelism: sum the gradients over all processes (DDP), and optionally shard the weights across them (FSDP).

With `ddp`, each process has a copy of the model (torch's DistributedDataParallel). With `fsdp`, weights, gradients and optimizer
state are sharded (FSDP2's `fully_shard`, one unit per block). Both reduce gradients in float32, once per optimizer step, during the
last micro-batch. The model contains no code for parallelism, and optimizers are built from the unwrapped network.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tinylm.cost.micro_batch import data_parallelism, host_memory_bytes
from tinylm.model import lora, registry
from tinylm.model.base import Model
from tinylm.processes import SINGLE_PROCESS, Processes, lost_peer_error
from tinylm.recipe import Recipe
from tinylm.training.precision import Precision

if TYPE_CHECKING:  # these imports take a second and are only needed with several processes
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh
    from torch.nn.parallel import DistributedDataParallel


def resolve(recipe: Recipe, vocab_size: int, device: torch.device, processes: Processes) -> str:
    """Return `none` for a single process, else `ddp` or `fsdp`.

    `auto` becomes `ddp` if the training state takes at most half of a device's memory, or if the memory cannot be estimated for the
    architecture.
    """
    if processes.world_size == 1:
        return "none"
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = host_memory_bytes() // processes.world_size
    return data_parallelism(recipe, vocab_size, memory, processes.world_size)


class Parallel:
    """Prepares a network for training with several processes.

    The attribute `network` is the network that was passed in. Use it for evaluation, for saving and for building the optimizers.
    For training, call the module that `micro_batch` yields.
    """

    def __init__(
        self, network: Model, name: str = "none", processes: Processes = SINGLE_PROCESS, precision: Precision | None = None
    ) -> None:
        self.network = network
        self.name = name
        self.processes = processes
        self.mesh: DeviceMesh | None = None
        self._replicas: DistributedDataParallel | None = None
        if name == "none":
            return
        from torch.distributed.device_mesh import init_device_mesh

        device = network.device
        self.mesh = init_device_mesh(device.type, (processes.world_size,))
        # Silence torch's message that gloo emulates redistribution with an all-gather, which is slower but correct.
        logging.getLogger("torch.distributed.tensor._collective_utils").setLevel(logging.ERROR)
        self._host_mesh = self.mesh if device.type == "cpu" else init_device_mesh("cpu", (processes.world_size,))
        if name == "fsdp":
            _shard(network, self.mesh, precision)
        else:
            self._replicas = _replicate(network, device)

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[nn.Module]:
        """Yield the module to call for this micro-batch. Gradients are reduced only in the `last` micro-batch of a step."""
        if self._replicas is None:
            if self.name == "fsdp":
                self.network.set_requires_gradient_sync(last)  # type: ignore[operator]  # a method that fully_shard adds
            yield self.network
            return
        with nullcontext() if last else self._replicas.no_sync():
            yield self._replicas

    def all_reduce(self, part: Tensor) -> Tensor:
        """Sum a tensor over all processes. The result stays on the device, in float64 if there are several processes."""
        if self.mesh is None:
            return part
        import torch.distributed as dist

        total = part.double()
        try:
            dist.all_reduce(total)
        except RuntimeError as error:
            raise lost_peer_error(error) or error from None
        return total

    def full_weights(self) -> dict[str, Tensor]:
        """Copy all weights to the CPU, by name. Tied weights are included once. The result is empty except in the main process.

        This is a collective: all processes must call it.
        """
        copies = HostCopies()
        weights = {}
        for name, tensor in self.network.stored_weights().items():
            full = full_tensor(tensor)
            if self.processes.is_main:
                weights[name] = copies.start(full)
        copies.wait()
        return weights

    def cpu_copies(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy tensors to the CPU. Training does not modify the copies. Copies of sharded tensors are sharded in the same way."""
        copies = HostCopies()
        on_host = {name: self._cpu_copy(tensor, copies) for name, tensor in tensors.items()}
        copies.wait()
        return on_host

    def _cpu_copy(self, tensor: Any, copies: HostCopies) -> Tensor:
        if not hasattr(tensor, "to_local"):
            return copies.start(tensor)
        from torch.distributed.tensor import DTensor

        local = copies.start(tensor.to_local())
        shape = {"shape": tensor.shape, "stride": tensor.stride()}
        return DTensor.from_local(local, self._host_mesh, tensor.placements, run_check=False, **shape)

    @contextmanager
    def full_network(self) -> Iterator[Model | None]:
        """Yield the unsharded network in the main process and None in the others. On exit, the others wait for the main process."""
        network: Model | None = None
        if self.name == "fsdp":
            weights = self.full_weights()
            if self.processes.is_main:
                network = self._unsharded_copy(weights)
        elif self.processes.is_main:
            network = self.network
        yield network
        self.processes.any(False)  # any collective is a barrier

    def _unsharded_copy(self, weights: Mapping[str, Tensor]) -> Model:
        """Build an unsharded copy of the network on the same device, with these weights."""
        sharded = self.network
        network = registry.build(
            sharded.model, sharded.vocab_size, None, objective=sharded.objective, with_lora=lora.section_of(sharded)
        )
        network = network.to(sharded.device)
        with torch.no_grad():
            for name, tensor in network.stored_weights().items():
                tensor.copy_(weights[name])
        return network


class HostCopies:
    """Copies tensors to the host. From a CUDA GPU, the copies are queued to pinned memory, and only `wait` waits for the GPU.

    PyTorch reuses the pinned memory for later copies once the tensors have been freed.
    """

    def __init__(self) -> None:
        self._device: torch.device | None = None

    def start(self, tensor: Tensor) -> Tensor:
        """Return a copy on the CPU. On a GPU, its values are undefined until `wait` returns."""
        tensor = tensor.detach()
        if tensor.device.type != "cuda":
            return tensor.to("cpu", copy=True)
        self._device = tensor.device
        try:
            pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        except RuntimeError:  # the host cannot pin that much memory
            return tensor.to("cpu", copy=True)
        return pinned.copy_(tensor, non_blocking=True)

    def wait(self) -> None:
        """Wait until all copies are complete."""
        if self._device is not None:
            torch.cuda.current_stream(self._device).synchronize()


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor, or reduce a partial one, in every process. Other tensors are returned unchanged.

    This is a collective: all processes must call it.
    """
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def tensor_norms(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, float]:
    """Return the Euclidean norm of each named tensor, computed in float64."""
    return {name: float(full_tensor(torch.linalg.vector_norm(tensor.detach().double()))) for name, tensor in tensors}


def _shard(network: Model, mesh: DeviceMesh, precision: Precision | None) -> None:
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    half = torch.bfloat16 if precision is not None and precision.name == "bf16" else None  # not float16: its range is too small
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for unit in network.compile_units():
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    fully_shard(network, mesh=mesh, mp_policy=policy)  # the remaining parameters; tied weights must be in the same unit
    for method in ("hidden", "logits"):  # evaluation calls these instead of forward
        register_fsdp_forward_method(network, method)
    # A block returns its value embeddings as a view. torch warns against modifying such a view in place, but no code does that.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for module in network.modules():
        if isinstance(module, FSDPModule):  # sum gradients, because losses are already divided by the global number of targets
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


def _replicate(network: Model, device: torch.device) -> DistributedDataParallel:
    from torch.nn.parallel import DistributedDataParallel

    # DDP reduces gradients in buckets, and rebuilds the buckets after the first step unless `find_unused_parameters` is set.
    # Without that setting, the first step of a resumed run would use different buckets than in an uninterrupted run, and the
    # rounding would differ.
    ids = [device] if device.type == "cuda" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 renames broadcast_buffers; older versions lack the new name
        replicas = DistributedDataParallel(network, device_ids=ids, broadcast_buffers=False, find_unused_parameters=True)
    replicas.register_comm_hook(None, lambda state, bucket: _sum_gradients(bucket))
    return replicas


def _sum_gradients(bucket: dist.GradBucket) -> torch.futures.Future[Any]:  # type: ignore[name-defined]
    """Sum gradients instead of averaging them, because losses are already divided by the global number of targets."""
    import torch.distributed as dist

    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    summed: torch.futures.Future[Any] = work.get_future().then(lambda future: future.value()[0])
    return summed
