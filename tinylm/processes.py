"""The processes of one training: which of them this is, and what they must agree on. Alone, every answer is one's own.

A launcher such as torchrun says through RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT how many there are. What they
tell each other here are small facts on the host (gloo); gradients and weights are `training.parallel`'s affair.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from tinylm.errors import InputError, TinylmError, WorkError

if TYPE_CHECKING:  # who one is can be told without waiting for torch
    import torch
    from torch.distributed import ProcessGroup

Result = TypeVar("Result")
_PATIENCE = timedelta(hours=12)
"""How long the others wait while the main process prepares a text or samples; one that has died is noticed at once."""


@dataclass(frozen=True)
class Place:
    """Which process this is, of how many, and which of those on this machine."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0


def launched() -> Place:
    """What the launcher says; alone without one. Raises `InputError` for numbers that make no sense."""
    given = {name: os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))}
    given["LOCAL_RANK"] = os.environ.get("LOCAL_RANK", given["RANK"])
    for name, value in given.items():
        if not value.isdigit():
            raise InputError(f"{value!r} is not a number", where=name, hint="a launcher such as torchrun sets it")
    rank, count, local = (int(value) for value in given.values())
    if rank >= max(count, 1):
        raise InputError(f"is {rank}, but WORLD_SIZE says there are {count} processes", where="RANK")
    return Place(rank, max(count, 1), local)


def threads_of_each() -> int | None:
    """CPU threads for each of several processes of a machine: an equal part of its cores. None leaves the choice to torch.

    torchrun says OMP_NUM_THREADS=1 unless the user said something else, which then counts.
    """
    place, here = launched(), os.environ.get("LOCAL_WORLD_SIZE", "")
    if place.count == 1 or os.environ.get("OMP_NUM_THREADS", "1") != "1" or not here.isdigit():
        return None
    return max(1, (os.cpu_count() or 1) // max(1, int(here)))


class PeerFailed(TinylmError):
    """Another process has said what went wrong; this one ends with the same exit code and in silence."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("")
        self.exit_code = exit_code


class Processes:
    """This process among those of a training. Every method must be called by all of them, in the same order."""

    def __init__(self, place: Place, group: ProcessGroup | None = None) -> None:
        self.rank: int = place.rank
        self.count: int = place.count
        self.local_rank: int = place.local_rank
        self.group = group
        self._place = place

    @property
    def main(self) -> bool:
        """Whether this is the one that speaks and writes."""
        return self.rank == 0

    def device(self, device: torch.device) -> torch.device:
        """Which of this machine's devices is this process's: the GPU of its local rank, unless one was named."""
        if device.type != "cuda" or self.group is None or ":" in str(device):
            return device
        import torch

        if self.local_rank >= torch.cuda.device_count():
            raise InputError(
                f"process {self.local_rank} of this machine finds {torch.cuda.device_count()} GPUs", where="--nproc-per-node"
            )
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def line(self) -> Processes:
        """The same processes on a line of their own, so that a thread can talk while others talk."""
        if self.group is None:
            return self
        import torch.distributed as dist

        return Processes(self._place, dist.new_group(backend="gloo", timeout=_PATIENCE))

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """Everybody's values, by rank, in float64."""
        if self.group is None:
            return [list(values)]
        import torch
        import torch.distributed as dist

        own = torch.tensor(values, dtype=torch.float64)
        everybodys = [torch.empty_like(own) for _ in range(self.count)]
        with _lost_peers():
            dist.all_gather(everybodys, own, group=self.group)
        return [each.tolist() for each in everybodys]

    def any(self, flag: bool) -> bool:
        """Whether it holds in any process."""
        return any(value for (value,) in self.gather([flag]))

    def total(self, array: Any) -> Any:
        """The sum of everybody's arrays of one shape and type."""
        if self.group is None:
            return array
        import torch
        import torch.distributed as dist

        summed = torch.from_numpy(array.copy())
        with _lost_peers():
            dist.all_reduce(summed, group=self.group)
        return summed.numpy()

    def run_on_main(self, work: Callable[[], Result]) -> Result:
        """What the main process's `work` returns, for all; what it raises ends all, and only it says why."""
        if self.group is None:
            return work()
        import torch.distributed as dist

        told: list[Any] = [None, None]
        error: BaseException | None = None
        if self.main:
            try:
                told[0] = work()
            except BaseException as raised:
                error, told[1] = raised, _exit_code(raised)
        with _lost_peers():
            dist.broadcast_object_list(told, src=dist.get_global_rank(self.group, 0), group=self.group)
        result, code = told
        if error is not None:
            raise error
        if code is not None:
            raise PeerFailed(code)
        return result  # type: ignore[no-any-return]

    def run_on_all(self, work: Callable[[], Result]) -> Result:
        """What this process's `work` returns; where any raises, all end, and those that failed say why."""
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
        return result  # type: ignore[return-value]  # None only where it is the result


SINGLE_PROCESS = Processes(Place())


@contextmanager
def joined(device: torch.device) -> Iterator[Processes]:
    """All processes of this training, once each of them is here; without a launcher only this one.

    A process group that was set up before is used and left as it is.
    """
    import torch.distributed as dist

    there = dist.is_initialized()
    place = launched()
    if not there and place.count == 1:
        yield SINGLE_PROCESS
        return
    if there:
        rank = dist.get_rank()
        place = Place(rank, dist.get_world_size(), int(os.environ.get("LOCAL_RANK", rank)))
    else:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, rank=place.rank, world_size=place.count, timeout=_PATIENCE)
        except (ValueError, RuntimeError) as error:
            hint = "start with: torchrun --nproc-per-node N -m tinylm train ..."
            raise InputError(f"the processes cannot find each other: {_first_line(error)}", where="WORLD_SIZE", hint=hint) from None
    try:
        yield Processes(place, dist.new_group(backend="gloo", timeout=_PATIENCE))
    finally:
        if not there:
            dist.destroy_process_group()


@contextmanager
def _lost_peers() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise lost_peer(error) or error from None


def lost_peer(error: RuntimeError) -> WorkError | None:
    """The error for people when a collective operation failed because a process has gone; None for other errors."""
    import torch.distributed as dist

    words = ("gloo", "onnection closed", "onnection reset", "NCCL", "Broken pipe")
    if isinstance(error, getattr(dist, "DistBackendError", ())) or any(word in str(error) for word in words):
        return WorkError("another process of this training has ended", hint="its own message says why; --resume goes on")
    return None


def _exit_code(error: BaseException) -> int:
    if isinstance(error, TinylmError):
        return error.exit_code
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code or 1
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
