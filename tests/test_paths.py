"""Files are written atomically, and TINYLM_CACHE sets the cache folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import platformdirs
import pytest

from tinylm.paths import atomic_file, atomic_write_text, cache_folder


def test_a_file_appears_only_on_success(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    with atomic_file(path) as temporary:
        temporary.write_text("content")
        assert not path.exists()
        assert temporary.parent == path.parent, "a rename inside one folder is atomic"
    assert path.read_text() == "content"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_keeps_the_old_file_and_leaves_no_other_file(tmp_path: Path, error: type[BaseException]) -> None:
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


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no umask")
def test_the_permissions_of_a_file_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        atomic_write_text(tmp_path / "a.txt", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o640


def test_the_environment_sets_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYLM_CACHE", str(tmp_path / "cache"))
    assert cache_folder("a", "b") == tmp_path / "cache" / "a" / "b"
    assert (tmp_path / "cache" / "a" / "b").is_dir()
    monkeypatch.delenv("TINYLM_CACHE")
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name, appauthor: str(tmp_path / name))
    assert cache_folder() == tmp_path / "tinylm"
