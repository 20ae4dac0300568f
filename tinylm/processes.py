"""The processes of a distributed run: this process's rank, and collectives that exchange values and errors among processes.

A launcher such as torchrun describes the processes through RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. The
collectives in this module exchange small values on the host (gloo). `tinylm.training.parallel` exchanges gradients and weights.
With a single process, collectives are no-ops.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from tinylm.cpu_load import available_cores
from tinylm.errors import InputError, TinylmError, WorkError, first_line

if TYPE_CHECKING:  # `launch_info` does not import torch
    import torch
    from torch.distributed import ProcessGroup

Result = TypeVar("Result")
_TIMEOUT = timedelta(hours=12)
"""How long a process waits in a collective, for example while the main process prepares a text. Dead peers are detected sooner."""


@dataclass(frozen=True)
class LaunchInfo:
    """This process's rank, the number of processes (world size), and this process's rank on its machine (local rank)."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def launch_info() -> LaunchInfo:
    """Read the launcher's environment variables. Without a launcher, the result describes a single process.

    Raises `InputError` if a variable is not a number or the rank is out of range.
    """
    variables = {name: os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))}
    variables["LOCAL_RANK"] = os.environ.get("LOCAL_RANK", variables["RANK"])
    for name, value in variables.items():
        if not value.isdigit():
            raise InputError(f"{value!r} is not a number", where=name, hint="a launcher such as torchrun sets it")
    rank, world_size, local_rank = (int(value) for value in variables.values())
    if rank >= max(world_size, 1):
        raise InputError(f"must be below WORLD_SIZE ({world_size}), not {rank}", where="RANK")
    return LaunchInfo(rank, max(world_size, 1), local_rank)


def threads_per_process() -> int | None:
    """Return an equal share of the CPU cores if several processes share a machine, or None to keep torch's default.

    torchrun sets OMP_NUM_THREADS=1 by default. Any other value was set by the user and takes precedence.
    """
    processes_on_machine = os.environ.get("LOCAL_WORLD_SIZE", "")
    threads_set_by_user = os.environ.get("OMP_NUM_THREADS", "1") != "1"
    if launch_info().world_size == 1 or threads_set_by_user or not processes_on_machine.isdigit():
        return None
    return max(1, available_cores() // max(1, int(processes_on_machine)))


class PeerFailed(TinylmError):
    """Another process has reported an error. This process exits with the same code and prints nothing."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("")
        self.exit_code = exit_code


class Processes:
    """This process's view of all processes in a training run.

    Every method except `device` is a collective: all processes must call it in the same order.
    """

    def __init__(self, launch: LaunchInfo, group: ProcessGroup | None = None) -> None:
        self.rank: int = launch.rank
        self.world_size: int = launch.world_size
        self.local_rank: int = launch.local_rank
        self.group = group
        self._launch = launch

    @property
    def is_main(self) -> bool:
        """Whether this is the main process (rank 0), the only one that logs and writes files."""
        return self.rank == 0

    def device(self, device: torch.device) -> torch.device:
        """Return this process's device. In a distributed run, `cuda` without an index means the GPU whose index is the local rank.

        Raises `InputError` if there is no such GPU.
        """
        if device.type != "cuda" or self.group is None or ":" in str(device):
            return device
        import torch

        if self.local_rank >= torch.cuda.device_count():
            problem = f"local rank {self.local_rank} has no GPU: this machine has {torch.cuda.device_count()}"
            raise InputError(problem, where="--nproc-per-node", hint="start at most one process per GPU")
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def new_group(self) -> Processes:
        """Return the same processes with a new process group, so that another thread can communicate independently."""
        if self.group is None:
            return self
        import torch.distributed as dist

        return Processes(self._launch, dist.new_group(backend="gloo", timeout=_TIMEOUT))

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """Return the values of every process, indexed by rank, in float64."""
        if self.group is None:
            return [list(values)]
        import torch
        import torch.distributed as dist

        local = torch.tensor(values, dtype=torch.float64)
        gathered = [torch.empty_like(local) for _ in range(self.world_size)]
        with _translate_lost_peers():
            dist.all_gather(gathered, local, group=self.group)
        return [tensor.tolist() for tensor in gathered]

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any process."""
        return any(value for (value,) in self.gather([flag]))

    def sum(self, array: Any) -> Any:
        """Return the elementwise sum of a NumPy array over all processes. All processes must pass the same shape and dtype."""
        if self.group is None:
            return array
        import torch
        import torch.distributed as dist

        summed = torch.from_numpy(array.copy())
        with _translate_lost_peers():
            dist.all_reduce(summed, group=self.group)
        return summed.numpy()

    def run_on_main(self, work: Callable[[], Result]) -> Result:
        """Run `work` in the main process only, and return its result in every process.

        If `work` raises, the main process raises that error and the others raise `PeerFailed`.
        """
        if self.group is None:
            return work()
        import torch.distributed as dist

        broadcast: list[Any] = [None, None]  # result, exit code
        error: BaseException | None = None
        if self.is_main:
            try:
                broadcast[0] = work()
            except BaseException as raised:
                error, broadcast[1] = raised, _exit_code(raised)
        with _translate_lost_peers():
            dist.broadcast_object_list(broadcast, src=dist.get_global_rank(self.group, 0), group=self.group)
        result, code = broadcast
        if error is not None:
            raise error
        if code is not None:
            raise PeerFailed(code)
        return result  # type: ignore[no-any-return]

    def run_on_all(self, work: Callable[[], Result]) -> Result:
        """Run `work` in every process, and return this process's own result.

        If `work` raises in a process, that process raises the error and the others raise `PeerFailed`.
        """
        if self.group is None:
            return work()
        result: Result | None = None
        error: BaseException | None = None
        try:
            result = work()
        except BaseException as raised:
            error = raised
        codes = [int(code) for (code,) in self.gather([_exit_code(error) if error is not None else 0])]
        if error is not None:
            raise error
        if any(codes):
            raise PeerFailed(max(codes))
        return result  # type: ignore[return-value]  # None only if `work` returned None


SINGLE_PROCESS = Processes(LaunchInfo())


@contextmanager
def join_processes(device: torch.device) -> Iterator[Processes]:
    """Wait for all processes in this training run and connect them. Without a launcher, yield a single process.

    If torch.distributed is already initialized, it is used and not shut down. Raises `InputError` if the processes cannot connect.
    """
    import torch.distributed as dist

    initialized = dist.is_initialized()
    launch = launch_info()
    if not initialized and launch.world_size == 1:
        yield SINGLE_PROCESS
        return
    if initialized:
        rank = dist.get_rank()
        launch = LaunchInfo(rank, dist.get_world_size(), int(os.environ.get("LOCAL_RANK", rank)))
    else:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, rank=launch.rank, world_size=launch.world_size, timeout=_TIMEOUT)
        except (ValueError, RuntimeError) as error:
            hint = "start with: torchrun --nproc-per-node N -m tinylm train ..."
            raise InputError(f"the processes cannot connect: {first_line(error)}", where="WORLD_SIZE", hint=hint) from None
    try:
        yield Processes(launch, dist.new_group(backend="gloo", timeout=_TIMEOUT))
    finally:
        if not initialized:
            dist.destroy_process_group()


@contextmanager
def _translate_lost_peers() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise lost_peer_error(error) or error from None


def lost_peer_error(error: RuntimeError) -> WorkError | None:
    """Return a `WorkError` if a collective failed because another process has ended, or None for other errors."""
    import torch.distributed as dist

    words = ("gloo", "onnection closed", "onnection reset", "NCCL", "Broken pipe")
    if isinstance(error, getattr(dist, "DistBackendError", ())) or any(word in str(error) for word in words):
        return WorkError("another process of this training run has ended", hint="see its error message; resume with --resume")
    return None


def _exit_code(error: BaseException) -> int:
    if isinstance(error, TinylmError):
        return error.exit_code
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code or 1
    return 130 if isinstance(error, KeyboardInterrupt) else 1
