"""Test `tinylm serve` when the process runs out of file descriptors."""

from __future__ import annotations

import json
import shlex
import socket
import subprocess
import urllib.request
from pathlib import Path

import pytest
from command import COMMAND, environment

from tinylm.run import Run

pytest.importorskip("uvicorn")


def test_a_server_without_free_file_descriptors_logs_little_and_recovers(tiny_run: Run, tmp_path: Path) -> None:
    command = f"ulimit -n 80 && exec {shlex.join(COMMAND)} serve -r {shlex.quote(str(tiny_run.path))} --port 0 --no-compile"
    log = tmp_path / "log"
    with (
        open(log, "wb") as stderr,
        subprocess.Popen(["bash", "-c", command], stdout=subprocess.PIPE, stderr=stderr, env=environment(), text=True) as process,
    ):
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            assert address, log.read_text(encoding="utf-8")
            port = int(address.rpartition(":")[2])
            connections = [socket.create_connection(("127.0.0.1", port), timeout=60) for _ in range(300)]
            with urllib.request.urlopen(f"{address}/health", timeout=60) as response:
                assert json.load(response)["status"] == "ok"
            for connection in connections:
                connection.close()
            with urllib.request.urlopen(f"{address}/health", timeout=60) as response:
                assert json.load(response)["status"] == "ok"
        finally:
            process.terminate()
        assert process.wait(30) in (0, 143)
    lines = log.read_text(encoding="utf-8").splitlines()
    assert any("at most 32 connections" in line for line in lines)
    assert any("out of system resource" in line for line in lines), "the test must exhaust the file descriptors"
    assert len(lines) < 40
