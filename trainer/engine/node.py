"""The processes of a run on one further machine: `python -m trainer.engine.node`, started by ssh.

`cluster.py` on the first machine talks to it in lines. On stdin: the job as JSON, then numbers of
signals to pass on, and empty lines as signs of life. On stdout, JSON: `hello`, `failed` with the
exit code of the first process that did, `ended` with that of all. What the processes print goes to
stderr. When stdin closes, or stays silent, nobody waits for this machine any more: everything here
is killed. Imports no torch.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.contract.errors import UserError
from trainer.engine.addresses import interface_towards
from trainer.engine.launch import POLL_S, Workers, signals_to

HEARTBEAT_S = 10.0
SILENCE_S = 180.0
"""So long without a sign of life from the first machine, and it is taken for dead."""
SEEN_WITHIN_S = 30.0
"""Network file systems may remember for a while that a file was not there."""
_CHUNK = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeJob:
    """What one machine has to run."""

    command: list[str]
    folder: str
    """Where the processes work: that of the first machine's launcher."""
    needed: str
    """A file of the run that this machine must see."""
    environment: dict[str, str]
    """Variables of the first machine that count here, too."""
    first_rank: int
    slots: int
    world_size: int
    address: str
    """Where rank 0 waits for the others: MASTER_ADDR."""
    port: int
    failure_grace_s: float
    stop_grace_s: float

    def to_line(self) -> bytes:
        """Return it as the line that `main` reads first."""
        return json.dumps(asdict(self)).encode() + b"\n"

    def worker_environment(self, index: int, interface: str | None) -> dict[str, str]:
        """Return what the process number `index` of this machine finds in its environment."""
        own = {
            "RANK": str(self.first_rank + index),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(index),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }
        # gloo takes the address of the machine's name, which often is loopback. NCCL looks itself.
        gloo = {} if interface is None else {"GLOO_SOCKET_IFNAME": interface}
        return gloo | self.environment | own


class Lines:
    """Complete lines out of a descriptor, as they come."""

    def __init__(self, descriptor: int) -> None:
        self.closed = False
        self._descriptor = descriptor
        self._rest = b""

    def read(self, wait_s: float) -> list[bytes]:
        """Return the lines that arrived within `wait_s` seconds; may be none."""
        if self.closed:
            time.sleep(wait_s)
            return []
        if not select.select([self._descriptor], [], [], wait_s)[0]:
            return []
        piece = os.read(self._descriptor, _CHUNK)
        self.closed = not piece
        *lines, self._rest = (self._rest + piece).split(b"\n")
        if self.closed and self._rest:
            lines.append(self._rest)
            self._rest = b""
        return lines


class _Abandoned(Exception):
    """The first machine is gone, or has had enough."""


def main() -> int:
    """Run one job, told on stdin; return its exit code."""
    lines = Lines(sys.stdin.fileno())
    try:
        _say(hello=socket.gethostname())
        job, waiting = _read_job(lines)
        return _run(job, lines, waiting)
    except (_Abandoned, BrokenPipeError):
        return 128 + signal.SIGKILL


def _read_job(lines: Lines) -> tuple[NodeJob, list[bytes]]:
    """Return the job, and the lines around it: a signal may come before."""
    deadline = time.monotonic() + SILENCE_S
    others: list[bytes] = []
    while time.monotonic() < deadline:
        found = lines.read(POLL_S)
        job = next((line for line in found if line.startswith(b"{")), None)
        others += [line for line in found if line is not job]
        if job is not None:
            return NodeJob(**json.loads(job)), others
        if lines.closed:
            break
    raise _Abandoned


def _run(job: NodeJob, lines: Lines, waiting: list[bytes]) -> int:
    group = Workers(failure_grace_s=job.failure_grace_s, stop_grace_s=job.stop_grace_s)
    with signals_to(group.on_signal):
        try:
            unseen = _enter(job)
            if unseen is not None:
                sys.stderr.write(
                    f"error: {socket.gethostname()} does not see {unseen} of the first machine; "
                    "several machines need a shared folder, see docs/clusters.md\n"
                )
                _say(ended=UserError.exit_code)
                return UserError.exit_code
            interface = interface_towards(job.address)
            for index in range(job.slots):
                own = job.worker_environment(index, interface)
                group.start(job.command, os.environ | own, stdout=sys.stderr)
            _watch(group, lines, waiting)
        finally:
            group.kill()
    _say(ended=group.exit_code())
    return group.exit_code()


def _enter(job: NodeJob) -> str | None:
    """Go to the job's folder; return what of it cannot be seen here."""
    deadline = time.monotonic() + SEEN_WITHIN_S
    while True:
        try:
            os.chdir(job.folder)
        except OSError:
            unseen = job.folder
        else:
            if Path(job.needed).exists():
                return None
            unseen = job.needed
        if time.monotonic() > deadline:
            return unseen
        time.sleep(0.5)


def _watch(group: Workers, lines: Lines, waiting: list[bytes]) -> None:
    heard, told = time.monotonic(), False
    while group.watch():
        if group.first_failure is not None and not told:
            _say(failed=group.exit_code())
            told = True
        for line in [*waiting, *lines.read(POLL_S)]:
            heard = time.monotonic()
            if line.strip().isdigit():
                group.on_signal(int(line), None)
        waiting = []
        if lines.closed:
            raise _Abandoned
        if time.monotonic() - heard > SILENCE_S:
            with suppress(OSError):
                sys.stderr.write(f"nothing heard from the first machine for {SILENCE_S:.0f} s\n")
            raise _Abandoned


def _say(**content: Any) -> None:
    os.write(sys.stdout.fileno(), json.dumps(content).encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main())
