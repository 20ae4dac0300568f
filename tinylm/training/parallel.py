"""How the processes of a training share its arithmetic: every gradient the sum of all, and with FSDP every weight held once.

`ddp`: each process holds the whole model (torch's DistributedDataParallel). `fsdp`: weights, gradients and optimiser state are
spread over the processes (FSDP2's `fully_shard`, a unit per block). Both sum gradients in float32, once per optimiser step,
with the last micro-batch. The model knows nothing of it, and optimisers are built from the network itself.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tinylm.cost import plan
from tinylm.model import lora
from tinylm.model.transformer import Transformer
from tinylm.processes import SINGLE_PROCESS, Processes, lost_peer
from tinylm.recipe import Recipe
from tinylm.training.precision import Precision

if TYPE_CHECKING:  # a second of import that only several processes need
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh
    from torch.nn.parallel import DistributedDataParallel

_SHARD_FROM = 0.5
"""auto: the share of a device's memory above which the weights, gradients and optimiser state of a model are spread."""


def resolve(name: str, recipe: Recipe, vocab_size: int, device: torch.device, processes: Processes) -> str:
    """`none` for one process, else ddp or fsdp; auto: ddp where the model's state leaves half of the memory free."""
    if processes.count == 1:
        return "none"
    if name != "auto":
        return name
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = plan.host_memory_bytes() // processes.count
    costs = plan.estimate_memory(recipe, vocab_size, 1)
    return "fsdp" if costs.weights + costs.gradients + costs.optimizer > _SHARD_FROM * memory else "ddp"


class Parallel:
    """A network, and how it computes with the others. `network` stays what it was: evaluate, save and optimise that."""

    def __init__(
        self, network: Transformer, name: str = "none", processes: Processes = SINGLE_PROCESS, precision: Precision | None = None
    ) -> None:
        self.network = network
        self.name = name
        self.processes = processes
        self.mesh: DeviceMesh | None = None
        self._replicas: DistributedDataParallel | None = None
        if name == "none":
            return
        from torch.distributed.device_mesh import init_device_mesh

        device = next(network.parameters()).device
        self.mesh = init_device_mesh(device.type, (processes.count,))
        # Torch tells that gloo moves shards by gathering them; that is slower, and right.
        logging.getLogger("torch.distributed.tensor._collective_utils").setLevel(logging.ERROR)
        self._host_mesh = self.mesh if device.type == "cpu" else init_device_mesh("cpu", (processes.count,))
        if name == "fsdp":
            _shard(network, self.mesh, precision)
        else:
            self._replicas = _replicated(network, device)

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[nn.Module]:
        """What to call in this micro-batch; only with the last do gradients travel."""
        if self._replicas is None:
            if self.name == "fsdp":
                self.network.set_requires_gradient_sync(last)  # type: ignore[operator]  # fully_shard has added it
            yield self.network
            return
        with nullcontext() if last else self._replicas.no_sync():
            yield self._replicas

    def total(self, part: Tensor) -> Tensor:
        """The sum of every process's number, on the device; of several in float64."""
        if self.mesh is None:
            return part
        import torch.distributed as dist

        whole = part.double()
        try:
            dist.all_reduce(whole)
        except RuntimeError as error:
            raise lost_peer(error) or error from None
        return whole

    def weights(self, for_all: bool = False) -> dict[str, Tensor]:
        """Copies of all weights in the host's memory, a tied head once. Empty but in the main process, unless `for_all`."""
        kept = {}
        for name, tensor in named_weights(self.network).items():
            whole = full_tensor(tensor)
            if self.processes.main or for_all:
                kept[name] = whole.to("cpu", copy=True)
        return kept

    def host_copies(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies in the host's memory that training no longer touches; of what is spread, this process's part."""
        return {name: self._host_copy(tensor) for name, tensor in tensors.items()}

    def _host_copy(self, tensor: Any) -> Tensor:
        if not hasattr(tensor, "to_local"):
            copied: Tensor = tensor.detach().to("cpu", copy=True)
            return copied
        from torch.distributed.tensor import DTensor

        part = tensor.to_local().detach().to("cpu", copy=True)
        shape = {"shape": tensor.shape, "stride": tensor.stride()}
        return DTensor.from_local(part, self._host_mesh, tensor.placements, run_check=False, **shape)

    @contextmanager
    def whole(self) -> Iterator[Transformer | None]:
        """The network with all its weights, in the main process; None in the others, which wait at the end."""
        if self.name == "fsdp":
            weights, network = self.weights(), None
            if self.processes.main:
                spread = self.network
                network = lora.blank(spread.model, spread.vocab_size, lora.section_of(spread)).to(spread.embedding.weight.device)
                fill(network, weights)
        else:
            network = self.network if self.processes.main else None
        yield network
        self.processes.any(False)


def named_weights(network: Transformer) -> dict[str, Tensor]:
    """What a checkpoint stores of a network, by name: a tied head is its embedding."""
    tensors = network.state_dict()
    if network.model.tie_embeddings:
        del tensors["head.weight"]
    return {name: tensor.detach() for name, tensor in tensors.items()}


def fill(network: Transformer, weights: Mapping[str, Tensor]) -> None:
    """Put back what `Parallel.weights` gave."""
    with torch.no_grad():
        for name, tensor in named_weights(network).items():
            tensor.copy_(weights[name])


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor that may be spread over the processes, or the number that they computed together, for each of them."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


def norms(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, float]:
    """The Euclidean norm of each named tensor, in float64."""
    return {name: float(full_tensor(torch.linalg.vector_norm(tensor.detach().double()))) for name, tensor in tensors}


def _shard(network: Transformer, mesh: DeviceMesh, precision: Precision | None) -> None:
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    half = torch.bfloat16 if precision is not None and precision.name == "bf16" else None  # float16 has not the range
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in network.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(network, mesh=mesh, mp_policy=policy)  # the rest; a tied head must stay with its embedding
    for method in ("hidden", "logits"):  # how a text is measured
        register_fsdp_forward_method(network, method)
    # A block hands on its values as a view, which nothing changes in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for module in network.modules():
        if isinstance(module, FSDPModule):  # losses are divided by the targets of all processes already
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


def _replicated(network: Transformer, device: torch.device) -> DistributedDataParallel:
    from torch.nn.parallel import DistributedDataParallel

    # Gradients travel in buckets, which DDP regroups after the first step unless it looks for unused parameters. A resumed
    # training would group, and so round, its first step in another way.
    ids = [device] if device.type == "cuda" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 has a new name for broadcast_buffers, which others lack
        replicas = DistributedDataParallel(network, device_ids=ids, broadcast_buffers=False, find_unused_parameters=True)
    replicas.register_comm_hook(None, lambda state, bucket: _summed(bucket))
    return replicas


def _summed(bucket: dist.GradBucket) -> torch.futures.Future[Any]:  # type: ignore[name-defined]
    """Sum gradients instead of averaging them: losses are divided by the targets of all processes already."""
    import torch.distributed as dist

    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    summed: torch.futures.Future[Any] = work.get_future().then(lambda future: future.value()[0])
    return summed
