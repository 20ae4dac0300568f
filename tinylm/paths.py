"""The cache folder, and atomic writes: a file or folder appears with its full content or not at all.

Content is written under a temporary name next to its destination, then renamed. The temporary file is locked while its process
runs, so that `remove_abandoned` can distinguish files of a killed process from files that are still being written.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import platformdirs
from safetensors import SafetensorError

from tinylm.errors import InputError, TinylmError

_TEMPORARY_NAME = re.compile(r"\..*\.[0-9a-f]{12}\.(tmp|old)")
_URL = re.compile(r"[a-z][a-z0-9+.-]+://.")
_MAX_NAME_CHARACTERS = 50
"""Temporary names contain up to this many characters of the destination's name, to stay below the file system's limit."""
_WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""Write errors that do not include a file name."""
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
"""The operating system's error number in an error message from a Rust library."""
_CACHE_DEPTH = 3
"""Number of folder levels in the cache that can contain temporary files."""


def cache_folder(*parts: str) -> Path:
    """Return a subfolder of TINYLM_CACHE or, if that is not set, of the user's cache folder. Creates it if necessary."""
    root = os.environ.get("TINYLM_CACHE") or platformdirs.user_cache_dir("tinylm", appauthor=False)
    folder = Path(root, *parts)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def clean_cache() -> None:
    """Remove temporary files and folders that killed processes left in the cache."""
    folders = [cache_folder()]
    for _ in range(_CACHE_DEPTH):
        for folder in folders:
            remove_abandoned(folder)
        folders = [Path(entry.path) for folder in folders for entry in _entries(folder) if entry.is_dir(follow_symlinks=False)]


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal."""
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def cached_file(path: Path, write: Callable[[Path], None], on_damage: Callable[[Path], None] | None = None) -> Path:
    """Return `path`, a file in the cache. Calls `write` with a temporary path if the file is missing or damaged.

    A `.sha256` file next to it contains the expected hash. If the content does not match, `on_damage` is called with `path`.
    """
    checksum = path.with_name(f"{path.name}.sha256")
    with suppress(OSError):
        if checksum.read_text(encoding="utf-8", errors="replace").strip() == sha256(path):
            return path
        if on_damage is not None:
            on_damage(path)
    clean_cache()
    with atomic_file(path) as temporary:
        write(temporary)
        digest = sha256(temporary)
    atomic_write_text(checksum, digest + "\n")
    return path


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable. Does nothing on Windows, where folders cannot be synced."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`. It replaces `path` on success and is removed if the block raises.

    If the block raises an `OSError` without a file name, for example because the disk is full, its file name is set to `path`.
    """
    with _temporary(path, folder=False) as temporary, name_write_errors(path, temporary):
        mode = stat.S_IMODE(temporary.stat().st_mode)  # as set by the umask of this process
        yield temporary
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
        sync_folder(path.parent)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `path`. It replaces `path` on success and is removed if the block raises.

    An existing folder is replaced atomically on Linux. Elsewhere, a process that is killed between two renames leaves the old
    folder under a hidden name, and the next call restores it.
    """
    _restore_interrupted(path)
    with _temporary(path, folder=True) as temporary, name_write_errors(path, temporary):
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        for file in temporary.rglob("*"):
            if not file.is_symlink():
                os.chmod(file, mode if file.is_dir() else mode & 0o666)
        _replace_folder(temporary, path)
        sync_folder(path.parent)


@contextmanager
def temporary_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """Yield a new folder in `parent` that is removed when the block ends, or by `remove_abandoned` if the process is killed."""
    with _temporary(parent / prefix, folder=True) as temporary:
        yield temporary


@contextmanager
def name_write_errors(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Set the file name of write errors to `path` if they have none, or if they refer to `temporary` or a file in it."""
    try:
        yield
    except SafetensorError as error:
        if (match := _OS_ERROR.search(str(error))) is None:
            raise
        code = int(match[1])
        raise OSError(code, os.strerror(code), str(path)) from None
    except TinylmError as error:
        if temporary is None or not str(error.where).startswith(str(temporary)):
            raise
        raise type(error)(error.message, where=str(path), hint=error.hint) from None
    except OSError as error:
        if error.errno is None and "requested and" in str(error):  # NumPy reports a short write without an error number
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None
        unnamed = error.filename is None and error.errno in _WRITE_ERRORS
        names = (error.filename, error.filename2)  # for a failed copy, the first name is the source
        if unnamed or (temporary is not None and any(str(name).startswith(str(temporary)) for name in names)):
            error.filename, error.filename2 = str(path), None
        raise


def remove_abandoned(folder: Path, name: str = "") -> None:
    """Remove temporary files and folders that killed processes left in `folder`.

    If `name` is set, only removes those for destinations whose names start with it. Does nothing on Windows, which does not have
    these locks.
    """
    for entry in _entries(folder):
        if entry.name.startswith(f".{name}") and _TEMPORARY_NAME.fullmatch(entry.name):
            path = Path(entry.path)
            with suppress(OSError):  # another process removed it, or it belongs to another user
                lock = _lock(path, wait=False)
                if lock is not None:
                    _remove(path)
                    os.close(lock)


def check_utf8(path: Path) -> None:
    """Raise `InputError` if the absolute path is not valid UTF-8, which safetensors and tokenizers require."""
    try:
        str(path.absolute()).encode("utf-8")
    except UnicodeEncodeError:
        hint = "rename the folder whose name is not UTF-8, or move the run"
        raise InputError("the path is not valid UTF-8", where=str(path), hint=hint) from None


def is_url(path: str) -> bool:
    """Whether a path is a URL such as `s3://bucket/run`."""
    return _URL.match(path) is not None


def is_temporary(name: str) -> bool:
    """Whether `name` belongs to a file or folder that is being written or that a killed process left behind."""
    return _TEMPORARY_NAME.fullmatch(name) is not None


def atomic_write_text(path: Path, text: str) -> None:
    """Write a small text file atomically, in UTF-8."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def _temporary(path: Path, *, folder: bool) -> Iterator[Path]:
    """Create a locked temporary file or folder next to `path`. Remove it when the block ends unless it was renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = path.name[:_MAX_NAME_CHARACTERS]
    remove_abandoned(path.parent, f"{prefix}.")
    temporary, lock = _create_locked(path.with_name(f".{prefix}"), folder=folder)
    try:
        yield temporary
    finally:
        _remove(temporary)
        if lock is not None:
            os.close(lock)


def _create_locked(prefix: Path, *, folder: bool) -> tuple[Path, int | None]:
    """Create a temporary file or folder and lock it. Returns its path and the lock, which is None if locks are not supported."""
    while True:
        temporary = prefix.with_name(f"{prefix.name}.{secrets.token_hex(6)}.tmp")
        if folder:
            temporary.mkdir()
        else:
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        with suppress(FileNotFoundError):  # another process's `remove_abandoned` removed it before it was locked
            lock = _lock(temporary, wait=True)
            if temporary.exists():
                return temporary, lock


def _lock(path: Path, *, wait: bool) -> int | None:
    """Lock a file or folder until the returned descriptor is closed or this process ends.

    Returns None if another process holds the lock and `wait` is false, or if locks are not supported.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _restore_interrupted(path: Path) -> None:
    """If `path` is missing because a process was killed while replacing it, rename its old content back."""
    if os.path.lexists(path):
        return
    for entry in _entries(path.parent):
        if entry.name.startswith(f".{path.name}.") and entry.name.endswith(".old") and is_temporary(entry.name):
            os.replace(entry.path, path)
            return


def _replace_folder(new: Path, path: Path) -> None:
    """Rename the folder `new` to `path`. An existing folder is removed, or stays in place if the rename fails."""
    if not os.path.lexists(path):
        os.replace(new, path)
        return
    if _exchange(new, path):  # `new` is now the old folder, which the caller removes
        return
    replaced = new.with_suffix(".old")
    os.replace(path, replaced)
    try:
        os.replace(new, path)
    except BaseException:
        os.replace(replaced, path)
        raise
    _remove(replaced)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths atomically. Returns False if the operating system or file system does not support this."""
    if sys.platform != "linux":
        return False
    import ctypes

    at_working_folder, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of linux/fcntl.h and linux/fs.h
    try:
        rename = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    return bool(rename(at_working_folder, os.fsencode(first), at_working_folder, os.fsencode(second), exchange) == 0)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        return list(os.scandir(folder))
    except OSError:
        return []
