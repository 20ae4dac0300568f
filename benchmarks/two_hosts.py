"""Train on two hosts, let one of them fail in the middle, bring it back, and compare the result with an unbroken run.

    sudo python benchmarks/two_hosts.py [--steps 60] [--scenario NAME]

The hosts are two Linux network namespaces that are connected by a pair of virtual network cards. They have separate caches and
share the run folder. On each host, torchrun starts two processes with a c10d rendezvous (gloo). The scenarios:

- `killed`: all processes on the second host are killed, and torchrun is started again there
- `unplugged`: the network card is disabled first, so the other host is not told that its connections have ended
- `rendezvous`: all processes on the host of the rendezvous are killed; torchrun is then started again on both hosts
- `signal`: torchrun gets SIGTERM on both hosts, as before the time limit of a Slurm job, and is then started again
- `separate`: as `killed`, but the hosts do not share the run folder

After each scenario, the weights, the losses and the evaluations must equal those of the unbroken run bit for bit. The script needs
root, because it creates network namespaces. It prints one line per scenario and exits with code 1 if a run differs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

RECIPE = """
name: two-hosts
data: {train: text.txt, heldout: {share: 0.1, by: tail}}
tokenizer: {kind: byte}
model: {n_layer: 2, n_head: 2, n_embd: 32, context_length: 32, dropout: 0.1}
training: {steps: STEPS, global_batch_size: 8, precision: fp32, compile: off, log_every: 1}
evaluation: {every: 20}
checkpoint: {every: 10, keep: 3}
"""
HOSTS = ("tinylm-host-1", "tinylm-host-2")
ADDRESSES = ("10.213.77.1", "10.213.77.2")
CARD = "eth0"
PORT = 29400
PROCESSES_PER_HOST = 2
JOIN_SECONDS = 60
TIMEOUT_SECONDS = 300


def ip(*arguments: str, check: bool = True) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise SystemExit(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


@contextmanager
def two_hosts() -> Iterator[None]:
    """Create two connected network namespaces, and remove them on exit with all processes in them."""
    for host in HOSTS:
        ip("netns", "add", host)
    try:
        ip("link", "add", CARD, "netns", HOSTS[0], "type", "veth", "peer", "name", CARD, "netns", HOSTS[1])
        for host, address in zip(HOSTS, ADDRESSES, strict=True):
            ip("-n", host, "addr", "add", f"{address}/24", "dev", CARD)
            for card in ("lo", CARD):
                ip("-n", host, "link", "set", card, "up")
        yield
    finally:
        for host in HOSTS:
            kill(host)
            ip("netns", "del", host, check=False)


def kill(host: str) -> None:
    """Kill all processes on a host."""
    for pid in ip("netns", "pids", host, check=False).split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


@dataclass
class Cluster:
    """Training processes on both hosts, in `folder`."""

    folder: Path
    name: str
    separate: bool = False
    """Whether the second host has its own folder."""
    torchruns: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def run(self) -> Path:
        return self.folder / self.name

    def start(self, host: str) -> None:
        number = HOSTS.index(host)
        command = ["ip", "netns", "exec", host, sys.executable, "-m", "torch.distributed.run"]
        command += ["--nnodes", "2", "--nproc-per-node", str(PROCESSES_PER_HOST), "--max-restarts", "3"]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES[0]}:{PORT}", "--rdzv-id", self.name]
        command += ["--rdzv-conf", f"is_host={1 - number},join_timeout={JOIN_SECONDS}", "--local-addr", ADDRESSES[number]]
        command += ["-m", "tinylm", "train", "recipe.yaml", "--out", self.name, "--resume", "--device", "cpu"]
        variables = {
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            "GLOO_SOCKET_IFNAME": CARD,
            "OMP_NUM_THREADS": "1",
            "TINYLM_CACHE": str(self.folder / f"cache-{host}"),
        }
        folder = self.folder
        if self.separate and number == 1:
            folder = self.folder / "second-host"
            folder.mkdir(exist_ok=True)
            for name in ("recipe.yaml", "text.txt"):
                shutil.copy(self.folder / name, folder)
        log = open(self.folder / f"{self.name}-{host}.log", "ab")  # noqa: SIM115  it is written until the process ends
        self.torchruns[host] = subprocess.Popen(
            command, cwd=folder, stdout=log, stderr=log, env={**os.environ, **variables}, start_new_session=True
        )

    def start_all(self) -> None:
        for host in HOSTS:
            self.start(host)

    def wait(self) -> list[int]:
        """Wait for torchrun on both hosts. Returns its exit codes."""
        return [process.wait(timeout=TIMEOUT_SECONDS) for process in self.torchruns.values()]

    def wait_until(self, condition: Callable[[], bool], problem: str) -> None:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not condition():
            if time.monotonic() > deadline:
                raise SystemExit(f"{self.name}: {problem}; see the logs in {self.folder}")
            time.sleep(0.005)

    def wait_for_step(self, step: int) -> None:
        self.wait_until(lambda: len(losses(self.run)) >= step, f"step {step} was not reached")

    def resumed_steps(self) -> list[int]:
        """The steps after which the run has continued, without those that are 0."""
        environment = json.loads((self.run / "environment.json").read_text(encoding="utf-8"))
        return [part["resumed_step"] for part in environment["resumed"] if part.get("resumed_step")]


def lines(run: Path) -> list[dict[str, object]]:
    metrics = run / "metrics.jsonl"
    complete = metrics.read_text(encoding="utf-8").rpartition("\n")[0] if metrics.exists() else ""
    return [json.loads(line) for line in complete.splitlines()]


def losses(run: Path) -> list[tuple[object, ...]]:
    """Step, loss, gradient norm and hash of the batch of each step."""
    return [(line["step"], line["loss"], line["grad_norm"], line["batch"]) for line in lines(run) if line["kind"] == "step"]


def evaluations(run: Path) -> list[tuple[object, ...]]:
    return [(line["step"], line["val_loss"]) for line in lines(run) if line["kind"] == "eval"]


def weights(run: Path) -> bytes:
    last = (run / "checkpoints" / "last").read_text(encoding="utf-8").strip()
    return (run / "checkpoints" / last / "model.safetensors").read_bytes()


def killed(cluster: Cluster, step: int) -> None:
    cluster.start_all()
    cluster.wait_for_step(step)
    kill(HOSTS[1])
    cluster.torchruns[HOSTS[1]].wait()
    cluster.start(HOSTS[1])


def unplugged(cluster: Cluster, step: int) -> None:
    cluster.start_all()
    cluster.wait_for_step(step)
    ip("-n", HOSTS[1], "link", "set", CARD, "down")
    kill(HOSTS[1])
    cluster.torchruns[HOSTS[1]].wait()
    time.sleep(1)
    ip("-n", HOSTS[1], "link", "set", CARD, "up")
    cluster.start(HOSTS[1])


def rendezvous(cluster: Cluster, step: int) -> None:
    cluster.start_all()
    cluster.wait_for_step(step)
    kill(HOSTS[0])
    codes = cluster.wait()
    assert all(codes), codes
    cluster.start_all()


def stopped(cluster: Cluster, step: int) -> None:
    cluster.start_all()
    cluster.wait_for_step(step)
    for process in cluster.torchruns.values():
        for pid in (process.pid, *map(int, ip("netns", "pids", HOSTS[list(cluster.torchruns.values()).index(process)]).split())):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)  # Slurm also sends the signal to all processes
    cluster.wait()
    last = int((cluster.run / "checkpoints" / "last").read_text(encoding="utf-8").strip().removeprefix("step-"))
    assert last == len(losses(cluster.run)), "the last step was not saved"
    cluster.start_all()


SCENARIOS: dict[str, Callable[[Cluster, int], None]] = {
    "killed": killed,
    "unplugged": unplugged,
    "rendezvous": rendezvous,
    "signal": stopped,
    "separate": killed,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--scenario", choices=SCENARIOS, action="append", help="can be repeated; default: all")
    parser.add_argument("--keep", action="store_true", help="keep the folder with the runs and the logs")
    arguments = parser.parse_args()
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None:
        print("skipped: network namespaces need Linux, root and the `ip` command")
        return 0
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # remove the namespaces
    folder = Path(tempfile.mkdtemp(prefix="tinylm-two-hosts-"))
    sentences = (f"Sentence {number} says that {number} times {number} is {number * number}.\n" for number in range(3000))
    (folder / "text.txt").write_text("".join(sentences), encoding="utf-8")
    (folder / "recipe.yaml").write_text(RECIPE.replace("STEPS", str(arguments.steps)), encoding="utf-8")
    equal = True
    with two_hosts():
        unbroken = Cluster(folder, "unbroken")
        start = time.monotonic()
        unbroken.start_all()
        codes = unbroken.wait()
        print(f"{'unbroken':11} exit codes {codes}, {len(losses(unbroken.run))} steps, {time.monotonic() - start:.0f} s")
        for name in arguments.scenario or SCENARIOS:
            cluster, start = Cluster(folder, name, separate=name == "separate"), time.monotonic()
            SCENARIOS[name](cluster, arguments.steps // 2)
            codes = cluster.wait()
            checks = {
                "weights": weights(cluster.run) == weights(unbroken.run),
                "losses": losses(cluster.run) == losses(unbroken.run),
                "evaluations": evaluations(cluster.run) == evaluations(unbroken.run),
            }
            different = [what for what, same in checks.items() if not same]
            result = f"different {', '.join(different)}" if different else "weights, losses and evaluations are bitwise equal"
            resumed = ", ".join(map(str, cluster.resumed_steps())) or "never"
            seconds = time.monotonic() - start
            print(
                f"{name:11} exit codes {codes}, resumed after step {resumed}, {seconds:.0f} s: {result}",
                flush=True,
            )
            equal = equal and not different and not any(codes)
    if equal and not arguments.keep:
        shutil.rmtree(folder)
    else:
        print(f"runs and logs: {folder}")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
