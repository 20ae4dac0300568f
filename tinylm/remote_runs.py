"""Copy run folders to and from an object store or any other file system that fsspec can open.

A remote copy has the same files as the run folder. A checkpoint is complete once its `manifest.json` exists, which is uploaded last
and removed first. An interrupted copy therefore never contains a checkpoint that looks complete but is not.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from tinylm.errors import InputError, WorkError, first_line, missing_filesystem
from tinylm.paths import atomic_file, cache_folder

MANIFEST = "manifest.json"
CHECKPOINTS = "checkpoints"
POINTERS = ("best", "last")
"""Files in the checkpoints folder that contain the name of a checkpoint."""
Result = TypeVar("Result")


class RemoteRun:
    """The copy of a run folder at a URL. All methods raise `WorkError` if the store cannot be reached."""

    def __init__(self, url: str, where: str | None = None) -> None:
        """Open the URL without connecting to the store. Raises `InputError` if no installed package supports its protocol.

        `where` is the recipe key or option that contains the URL.
        """
        import fsspec

        self.url = url.rstrip("/")
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.url)
        except ImportError as error:
            raise missing_filesystem(self.url, error, where=where) from None
        except ValueError as error:  # an unknown protocol
            raise InputError(f"cannot open {self.url}: {error}", where=where) from None
        except Exception as error:  # the library of each protocol has its own exceptions, for example for missing credentials
            raise WorkError(f"cannot be opened: {first_line(error)}", where=self.url) from None
        self._uploaded: dict[str, tuple[int, int]] = {}
        """Size and modification time of the small files when they were uploaded by this process."""

    @property
    def exists(self) -> bool:
        """Whether the URL contains a run."""
        return "recipe.yaml" in self._files()

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, in ascending order."""
        return sorted(int(name.removeprefix("step-")) for name in self._complete(self._files()))

    # Uploading

    def push(self, folder: Path, names: Sequence[str]) -> None:
        """Upload what has changed in a run folder. `names` are the files and folders of a run folder.

        Files other than checkpoints are uploaded first, so that the metrics are never older than the newest checkpoint. A
        checkpoint that is removed from the run folder in the meantime is left out.
        """
        with self._translated_errors():
            files = self._files()
            for name in names:
                if name != CHECKPOINTS:
                    for file in _files_in(folder / name):
                        self._push_file(file, file.relative_to(folder).as_posix())
            local = {path.parent.name: path.parent for path in (folder / CHECKPOINTS).glob(f"step-*/{MANIFEST}")}
            complete = self._complete(files)
            for name, path in sorted(local.items()):
                if self._push_checkpoint(path, name in complete):
                    complete.add(name)
            for pointer in POINTERS:
                named = _read(folder / CHECKPOINTS / pointer)
                if named is not None and named.strip() in complete:
                    self._write(f"{CHECKPOINTS}/{pointer}", named.encode())
            kept = set(local) | {(_read(folder / CHECKPOINTS / pointer) or "").strip() for pointer in POINTERS}
            for name in sorted(complete - kept):
                self._remove_checkpoint(name)

    def clear(self) -> None:
        """Remove the run, so that it does not look like one if this is interrupted."""
        with self._translated_errors():
            files = self._files()
            if "recipe.yaml" in files:
                self._fs.rm_file(self._path("recipe.yaml"))
            for name in self._complete(files):
                self._remove_checkpoint(name)
            for file in self._files():
                self._fs.rm_file(self._path(file))

    def _push_file(self, file: Path, name: str) -> None:
        try:
            status = file.stat()
            version = status.st_size, status.st_mtime_ns
            if self._uploaded.get(name) != version:
                self._write(name, file.read_bytes())
                self._uploaded[name] = version
        except FileNotFoundError:  # replaced or removed in the meantime
            return

    def _push_checkpoint(self, path: Path, is_complete: bool) -> bool:
        """Upload a checkpoint unless the store has it. Returns False if it has been removed from the run folder."""
        manifest, name = _read(path / MANIFEST), f"{CHECKPOINTS}/{path.name}"
        if manifest is None:
            return False
        if is_complete:
            if self._fs.cat_file(self._path(f"{name}/{MANIFEST}")) == manifest.encode():
                return True
            self._fs.rm_file(self._path(f"{name}/{MANIFEST}"))
        self._fs.makedirs(self._path(name), exist_ok=True)
        for file in json.loads(manifest)["files"]:
            try:
                self._fs.put_file(str(path / file), self._path(f"{name}/{file}"))
            except FileNotFoundError:
                if (path / file).exists():
                    raise
                return False
        self._write(f"{name}/{MANIFEST}", manifest.encode())
        return True

    def _remove_checkpoint(self, name: str) -> None:
        files = sorted(self._fs.find(self._path(f"{CHECKPOINTS}/{name}")), key=lambda file: not file.endswith(f"/{MANIFEST}"))
        for file in files:
            self._fs.rm_file(file)

    # Downloading

    def pull(self, folder: Path, names: Sequence[str], *, only: Sequence[str] | None = None) -> None:
        """Download the run into a run folder, and replace files that differ. `names` are as in `push`.

        `only` limits the checkpoints to these files, and to the best and the last checkpoint. Raises `InputError` if there is no
        run at the URL.
        """
        with self._translated_errors():
            files = self._files()
            if "recipe.yaml" not in files:
                raise InputError("there is no run at this URL", where=self.url)
            folder.mkdir(parents=True, exist_ok=True)
            pointers = {
                pointer: self._read(f"{CHECKPOINTS}/{pointer}") for pointer in POINTERS if f"{CHECKPOINTS}/{pointer}" in files
            }
            complete = self._complete(files)
            if only is not None:
                complete &= {text.strip() for text in pointers.values()}
            for file in sorted(files, key=lambda file: file != "recipe.yaml"):
                if file.partition("/")[0] in names and not file.startswith(f"{CHECKPOINTS}/"):
                    self._pull_file(file, folder / file)
            for name in sorted(complete):
                self._pull_checkpoint(folder / CHECKPOINTS / name, only)
            for pointer, text in pointers.items():
                if (folder / CHECKPOINTS / text.strip()).exists():
                    self._pull_file(f"{CHECKPOINTS}/{pointer}", folder / CHECKPOINTS / pointer)

    def _pull_file(self, name: str, file: Path) -> None:
        if not file.resolve().is_relative_to(file.parents[name.count("/")].resolve()):
            raise InputError(f"{name} is outside the run", where=self.url)
        with atomic_file(file) as temporary:
            self._fs.get_file(self._path(name), str(temporary))

    def _pull_checkpoint(self, path: Path, only: Sequence[str] | None) -> None:
        name = f"{CHECKPOINTS}/{path.name}"
        manifest = self._read(f"{name}/{MANIFEST}")
        files = [file for file in json.loads(manifest)["files"] if only is None or file in only]
        if any(Path(file).name != file for file in files):
            raise InputError(f"the manifest of {path.name} lists a file outside the checkpoint", where=self.url)
        if _read(path / MANIFEST) == manifest and all((path / file).exists() for file in files):
            return
        partial = path.with_name(f".{path.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for file in files:
            self._fs.get_file(self._path(f"{name}/{file}"), str(partial / file))
        (partial / MANIFEST).write_text(manifest, encoding="utf-8")
        shutil.rmtree(path, ignore_errors=True)
        os.replace(partial, path)

    # The store

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _files(self) -> set[str]:
        """Return the paths of all files, relative to the run."""

        def find() -> set[str]:
            self._fs.invalidate_cache()
            root = str(self._root).rstrip("/") + "/"
            return {file[len(root) :] for file in self._fs.find(self._root) if file.startswith(root)}

        return self._call(find)

    def _complete(self, files: set[str]) -> set[str]:
        """Return the names of the checkpoints that have a manifest."""
        parts = [file.split("/") for file in files]
        return {
            part[1]
            for part in parts
            if len(part) == 3 and part[0] == CHECKPOINTS and part[2] == MANIFEST and part[1].removeprefix("step-").isdecimal()
        }

    def _write(self, name: str, content: bytes) -> None:
        self._fs.makedirs(self._path(name).rpartition("/")[0], exist_ok=True)
        self._fs.pipe_file(self._path(name), content)

    def _read(self, name: str) -> str:
        content: bytes = self._fs.cat_file(self._path(name))
        return content.decode("utf-8", errors="replace")

    def _call(self, work: Callable[[], Result]) -> Result:
        with self._translated_errors():
            return work()

    @contextmanager
    def _translated_errors(self) -> Iterator[None]:
        try:
            yield
        except (InputError, WorkError):
            raise
        except Exception as error:  # the library of each protocol has its own exceptions
            raise WorkError(f"cannot be reached: {first_line(error)}", where=self.url) from None


def cached_copy(url: str, names: Sequence[str], only: Sequence[str]) -> Path:
    """Download what is needed to use the model of a run at a URL, and return the folder in the cache.

    What has been downloaded before is downloaded again only if it has changed. `names` and `only` are as in `RemoteRun.pull`.
    """
    remote = RemoteRun(url)
    folder = cache_folder("runs", hashlib.sha256(remote.url.encode()).hexdigest()[:16]) / remote.url.rpartition("/")[2]
    remote.pull(folder, names, only=only)
    return folder


def _files_in(path: Path) -> list[Path]:
    """Return a file, or all files in a folder, without temporary files."""
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
    return [path] if path.is_file() else []


def _read(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
