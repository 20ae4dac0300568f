"""Files are written atomically, and TINYLM_CACHE sets the cache folder."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
from pathlib import Path

import platformdirs
import pytest

from tinylm.paths import atomic_file, atomic_folder, atomic_write_text, cache_folder, clean_cache


def test_a_file_appears_only_on_success(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    with atomic_file(path) as temporary:
        temporary.write_text("content")
        assert not path.exists()
        assert temporary.parent == path.parent, "only a rename within one folder is atomic"
    assert path.read_text() == "content"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_keeps_the_old_file_and_leaves_no_temporary_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(error), atomic_file(path) as temporary:  # noqa: PT012
        temporary.write_text("half of the n")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_text_is_written_in_utf8_with_unix_line_endings(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "a.txt", "é\n🙂\n")
    assert (tmp_path / "a.txt").read_bytes() == "é\n🙂\n".encode()


@pytest.mark.skipif(sys.platform == "win32", reason="requires a umask")
def test_the_permissions_of_a_file_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        atomic_write_text(tmp_path / "a.txt", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o640


def test_an_environment_variable_sets_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYLM_CACHE", str(tmp_path / "cache"))
    assert cache_folder("a", "b") == tmp_path / "cache" / "a" / "b"
    assert (tmp_path / "cache" / "a" / "b").is_dir()
    monkeypatch.delenv("TINYLM_CACHE")
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name, appauthor: str(tmp_path / name))
    assert cache_folder() == tmp_path / "tinylm"


KILLED_WRITER = """
import os, signal, sys
from pathlib import Path
from tinylm.paths import atomic_file, atomic_folder
with atomic_file(Path(sys.argv[1]) / "file") as file, atomic_folder(Path(sys.argv[1]) / "folder") as folder:
    file.write_text("half")
    (folder / "inside").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="requires POSIX file locks")
def test_leftovers_from_a_killed_process_are_removed_but_not_files_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYLM_CACHE", str(tmp_path))
    subprocess.run([sys.executable, "-c", KILLED_WRITER, str(tmp_path / "tokens")], check=False)
    assert len(list((tmp_path / "tokens").iterdir())) == 2
    with atomic_file(tmp_path / "tokens" / "other") as current:
        clean_cache()
        assert list((tmp_path / "tokens").iterdir()) == [current]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_folder_is_replaced_completely(can_exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not can_exchange:
        monkeypatch.setattr(ctypes, "CDLL", _no_library)
    for content in ("old", "new"):
        with atomic_folder(tmp_path / "folder") as temporary:
            (temporary / content).write_text(content)
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["folder", "folder/new"]


def _no_library(name: object) -> None:
    raise OSError("no such library")


def test_the_old_folder_stays_if_the_new_one_cannot_be_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "old").write_text("old")
    monkeypatch.setattr(ctypes, "CDLL", _no_library)
    replace, calls = os.replace, []

    def fail_the_second_time(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_the_second_time)
    with pytest.raises(OSError, match="Input/output error"), atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "new").write_text("new")
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "old"]


def test_a_full_disk_is_reported_with_the_file_name(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"file\.txt") as error, atomic_file(tmp_path / "file.txt"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert error.value.filename == str(tmp_path / "file.txt")


def test_a_copy_that_fills_the_disk_is_reported_with_the_destination(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space") as error, atomic_folder(tmp_path / "copy") as temporary:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), __file__, None, str(temporary / "inside"))
    assert (error.value.filename, error.value.filename2) == (str(tmp_path / "copy"), None)
