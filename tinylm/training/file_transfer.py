"""Copy files between machines that train together but do not share the run folder.

The main process writes the run folder. A process on a machine that does not see that folder writes its part of a checkpoint to a
folder with the same path on its own machine, and reads checkpoints from there.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tinylm.processes import Processes

CHUNK_BYTES = 16 * 2**20


class FileTransfer:
    """Copies files to and from the main process. All methods are collectives. They do nothing if all machines share the folder."""

    def __init__(self, processes: Processes, separate: Sequence[bool]) -> None:
        """`separate` says for each rank whether its machine does not share the run folder with the main process."""
        self._processes = processes
        self._separate = tuple(separate)

    @classmethod
    def detect(cls, folder: Path, processes: Processes) -> FileTransfer:
        """Find out which machines share `folder`, which must exist in the main process."""
        if processes.group is None:
            return cls(processes, (False,))
        probe = folder / processes.run_on_main(lambda: f".probe-{secrets.token_hex(6)}")
        processes.run_on_main(probe.touch)
        separate = [bool(flag) for (flag,) in processes.gather([not probe.exists()])]
        processes.run_on_main(probe.unlink)
        return cls(processes, separate)

    def with_processes(self, processes: Processes) -> FileTransfer:
        """Return the same for another process group with the same processes."""
        return FileTransfer(processes, self._separate)

    @property
    def needed(self) -> bool:
        return any(self._separate)

    @property
    def _copies(self) -> bool:
        """Whether this process writes and sends the files of its machine."""
        return self._separate[self._processes.rank] and self._processes.local_rank == 0

    def recreate(self, folder: Path) -> None:
        """Create an empty folder on machines that do not share it."""
        if not self.needed:
            return

        def recreate() -> None:
            if self._copies:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)

        self._processes.run_on_all(recreate)

    def collect(self, folder: Path) -> None:
        """Move all files in `folder` on machines that do not share it to the same folder of the main process."""
        if not self.needed:
            return
        names = sorted(path.name for path in folder.iterdir()) if self._copies else []
        senders = self._processes.gather([len(names)])
        for rank, (count,) in enumerate(senders):
            for number in range(int(count)):
                self._send(folder / names[number] if rank == self._processes.rank else None, folder, rank, [0])
        if self._copies:
            shutil.rmtree(folder)

    @contextmanager
    def distributed(self, folder: Path) -> Iterator[None]:
        """Copy `folder` from the main process to machines that do not share it, and remove it there afterwards."""
        if not self.needed:
            yield
            return
        self.recreate(folder)
        is_main = self._processes.is_main
        names = self._processes.run_on_main(lambda: sorted(path.name for path in folder.iterdir()))
        receivers = [rank for rank, (copies,) in enumerate(self._processes.gather([self._copies])) if copies]
        for name in names:
            self._send(folder / name if is_main else None, folder, 0, receivers)
        self._processes.any(False)  # wait until all files have been written
        try:
            yield
        finally:
            if self._copies:
                shutil.rmtree(folder, ignore_errors=True)

    def _send(self, file: Path | None, folder: Path, sender: int, receivers: Sequence[int]) -> None:
        """Send a file from one process to others, which write it to `folder`. `file` is None except in the sender."""
        import torch
        import torch.distributed as dist

        group, rank = self._processes.group, self._processes.rank
        if rank != sender and rank not in receivers:
            return
        header: list[Any] = [None] if file is None else [(file.name, file.stat().st_size)]
        if file is not None:
            with open(file, "rb") as opened:
                for receiver in receivers:
                    dist.send_object_list(header, receiver, group=group)
                while chunk := opened.read(CHUNK_BYTES):
                    tensor = torch.frombuffer(bytearray(chunk), dtype=torch.uint8)
                    for receiver in receivers:
                        dist.send(tensor, receiver, group=group)
            return
        dist.recv_object_list(header, sender, group=group)
        name, left = header[0]
        with open(folder / name, "wb") as written:
            while left:
                tensor = torch.empty(min(left, CHUNK_BYTES), dtype=torch.uint8)
                dist.recv(tensor, sender, group=group)
                written.write(tensor.numpy().tobytes())
                left -= len(tensor)
