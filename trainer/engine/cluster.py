"""Starts one run on several machines from the first of them, and ends it everywhere together.

The processes of this machine are started directly, those of each other machine by one ssh
connection to `node.py` there. ssh asks no questions (BatchMode): a key, or an agent with one, must
open each machine. User names, ports and keys come from ~/.ssh/config. Imports no torch.
"""

from __future__ import annotations

import json
import os
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from trainer.contract.errors import ConfigError, RunError
from trainer.contract.hostfile import KEY, Host
from trainer.engine.addresses import free_port, interface_towards, is_loopback, is_this_machine
from trainer.engine.launch import (
    POLL_S,
    RENDEZVOUS_VARIABLE,
    Workers,
    die_with_parent,
    is_killed,
    refuse_windows,
    signals_to,
)
from trainer.engine.node import HEARTBEAT_S, Lines, NodeJob

HELLO_S = 180.0
"""How long a machine has to answer: ssh, then Python from what may be a slow shared folder."""
INTERRUPTED = 130
_LEAVE_S = 10.0
_SSH_OPTIONS = (
    *("-o", "BatchMode=yes"),
    *("-o", "ConnectTimeout=20"),
    *("-o", "ServerAliveInterval=15"),
    *("-o", "ServerAliveCountMax=4"),
    "-T",
)
_SOURCE_ROOT = Path(__file__).parents[2]
_TOLD_ON = ("NCCL_", "GLOO_", "TORCH_", "PYTORCH_", "CUDA_", "OMP_", "MKL_", "DS_", "MENMA_")
_TOLD_ON_NAMES = {"PATH", "LD_LIBRARY_PATH", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM"}
_OWN_TO_A_MACHINE = {"CUDA_VISIBLE_DEVICES", RENDEZVOUS_VARIABLE}


def run_cluster(
    command: Sequence[str],
    hosts: Sequence[Host],
    needed: Path,
    *,
    environment: Mapping[str, str] | None = None,
    failure_grace_s: float = 15.0,
    stop_grace_s: float = 900.0,
) -> int:
    """Run `command` in as many processes as the hosts have slots; return the run's exit code.

    Ranks count in the order of `hosts`; rank 0 is here. Failures, signals and exit codes are as in
    `launch.run_workers`, over all machines: the code is that of the first process that failed.
    What other machines print comes out on stderr, each line behind the machine's name.

    `needed` is a file of the run that every machine must see before anything is started there. It
    must be called from the main thread. MASTER_PORT in the environment is kept; without it a
    free port is taken.

    Raises:
        ConfigError: the first host is not this machine, or has no name that others can use.
        RunError: a machine cannot be reached or cannot start Python, in ssh's own words.
    """
    refuse_windows()
    require_first_here(hosts)
    base = {**(os.environ if environment is None else environment)}
    base.pop(RENDEZVOUS_VARIABLE, None)
    cluster = _Cluster(failure_grace_s, stop_grace_s)
    with signals_to(cluster.on_signal):
        try:
            cluster.connect(hosts[1:])
            if cluster.local.signals_seen:
                return INTERRUPTED
            cluster.start(command, hosts, needed, base)
            while cluster.watch():
                cluster.wait()
            return cluster.local.exit_code()
        finally:
            cluster.kill()


def require_first_here(hosts: Sequence[Host]) -> None:
    """Raise ConfigError where the run cannot be started from this machine."""
    first = hosts[0].name
    if not is_this_machine(first):
        raise ConfigError(
            f"{KEY}: the first machine, {first}, is not this one",
            hint="start the run on the first machine of the file, or put this one first",
        )
    if len(hosts) > 1 and is_loopback(first):
        raise ConfigError(
            f"{KEY}: {first} means another machine on each of them",
            hint="write a name or address of this machine that the others can reach",
        )


def told_on(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that other machines are given."""
    return {
        name: value
        for name, value in environment.items()
        if (name.startswith(_TOLD_ON) or name in _TOLD_ON_NAMES) and name not in _OWN_TO_A_MACHINE
    }


def ssh_command(host: str, environment: Mapping[str, str]) -> list[str]:
    """Return the argv that starts `node.py` on `host`, quoted for the shell there."""
    paths = [str(_SOURCE_ROOT), *filter(None, [environment.get("PYTHONPATH", "")])]
    # The current folder is kept off the path, as in `app.runs.child`.
    own = (f"PYTHONPATH={os.pathsep.join(paths)}", "PYTHONSAFEPATH=1", "PYTHONUNBUFFERED=1")
    remote = shlex.join(["env", *own, sys.executable, "-m", "trainer.engine.node"])
    return ["ssh", *_SSH_OPTIONS, host, remote]


class _Cluster:
    """The processes here, and a connection to each other machine."""

    def __init__(self, failure_grace_s: float, stop_grace_s: float) -> None:
        self.local = Workers(failure_grace_s=failure_grace_s, stop_grace_s=stop_grace_s)
        self.nodes: list[_Node] = []

    def connect(self, hosts: Sequence[Host]) -> None:
        """Start `node.py` on each host and wait until all have answered."""
        if hosts and shutil.which("ssh") is None:
            raise RunError("ssh is not on the PATH", hint="other machines are reached with it")
        self.nodes = [_Node(host) for host in hosts]
        deadline = time.monotonic() + HELLO_S
        while silent := [node for node in self.nodes if not node.said_hello]:
            if self.local.signals_seen:
                return
            for node in silent:
                node.pump()
                if node.is_gone() or time.monotonic() > deadline:
                    raise node.not_reached()
            self.wait()

    def start(
        self,
        command: Sequence[str],
        hosts: Sequence[Host],
        needed: Path,
        environment: Mapping[str, str],
    ) -> None:
        """Start all processes."""
        port = int(environment.get("MASTER_PORT") or free_port())
        first_rank, shared = 0, told_on(environment)
        for index, host in enumerate(hosts):
            job = NodeJob(
                command=list(command),
                folder=str(Path.cwd()),
                needed=str(needed.absolute()),
                environment=dict(environment) if index == 0 else shared,
                first_rank=first_rank,
                slots=host.slots,
                world_size=sum(each.slots for each in hosts),
                address=hosts[0].name,
                port=port,
                failure_grace_s=self.local.failure_grace_s,
                stop_grace_s=self.local.stop_grace_s,
            )
            first_rank += host.slots
            if index == 0:
                interface = _interface(hosts)
                for rank in range(host.slots):
                    self.local.start(command, job.worker_environment(rank, interface))
            else:
                self.nodes[index - 1].send(job.to_line())

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Pass a signal on to every machine; the third ends them at the next look."""
        self.local.on_signal(number, frame)
        for node in self.nodes:
            node.send(f"{number}\n".encode())

    def watch(self) -> bool:
        """Look after everybody once; return whether something still runs."""
        for node in self.nodes:  # before our own, who notice a lost peer and fail in turn
            node.pump()
            if (failure := node.failure()) is not None:
                self.local.note_failure(failure)
        running = self.local.watch() | any(not node.is_gone() for node in self.nodes)
        if running and (self.local.is_late() or self.local.signals_seen > 2):
            self.kill()
        return running

    def wait(self) -> None:
        """Wait a moment, less when some machine says something."""
        select.select([node.output for node in self.nodes if node.may_speak()], [], [], POLL_S)

    def kill(self) -> None:
        """Kill all processes, here and elsewhere."""
        self.local.kill()
        for node in self.nodes:
            node.let_go()
        deadline = time.monotonic() + _LEAVE_S
        for node in self.nodes:
            node.end(deadline)


class _Node:
    """The ssh connection to one machine, and what is known of it."""

    def __init__(self, host: Host) -> None:
        self.name = host.name
        self.said_hello = False
        self._outbox: deque[bytes] = deque()
        self._unsent = b""
        self._words: deque[str] = deque(maxlen=20)
        self._failed: int | None = None
        self._ended: int | None = None
        self._given_up = False
        self._drained = False
        self._next_sign = time.monotonic() + HEARTBEAT_S
        self._process = subprocess.Popen(
            ssh_command(host.name, os.environ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is for us to pass on, not for ssh to die of
            preexec_fn=die_with_parent(),  # noqa: PLW1509
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._input = self._process.stdin
        os.set_blocking(self._input.fileno(), False)
        self.output = self._process.stdout
        self._messages = Lines(self._process.stdout.fileno())
        self._errors = self._process.stderr
        self._prints = Lines(self._errors.fileno())

    def send(self, line: bytes) -> None:
        """Say something to the machine, at the next `pump`. Signal handlers may call this."""
        self._outbox.append(line)  # in one step, so that no line is lost between two

    def pump(self) -> None:
        """Send what is to be sent and take in what has come."""
        has_exited = self._process.poll() is not None  # what it said before is in the pipes by now
        now = time.monotonic()
        if now > self._next_sign and self.said_hello:
            self.send(b"\n")
            self._next_sign = now + HEARTBEAT_S
        self._write()
        while not self._messages.closed and (lines := self._messages.read(0)):
            for line in lines:
                self._take(line)
        while not self._prints.closed and (lines := self._prints.read(0)):
            self._words.extend(line.decode(errors="replace").rstrip() for line in lines)
            if self.said_hello:
                self._print()
        self._drained |= has_exited

    def failure(self) -> int | None:
        """Return the exit code of the first process that failed there; None while none has."""
        if self._failed is None and self.is_gone() and self._ended is None and not self._given_up:
            self._failed = 1
            sys.stderr.write(f"error: the ssh connection to {self.name} broke off\n")
        return self._failed

    def is_gone(self) -> bool:
        """Tell whether nothing runs there any more, or nobody can tell."""
        return self._ended is not None or self._drained

    def may_speak(self) -> bool:
        """Tell whether more can come over `output`."""
        return not self.is_gone() and not self._messages.closed

    def not_reached(self) -> RunError:
        """Return why the machine did not say hello."""
        said = "; ".join(word for word in self._words if word) or "it said nothing"
        code = self._process.poll()
        if code is None:
            return RunError(
                f"{self.name} did not answer within {HELLO_S:.0f} s: {said}",
                hint=f"`ssh -o BatchMode=yes {self.name} true` must come back at once",
            )
        if code == 255:  # ssh's own failures, see EXIT STATUS in ssh(1)
            return RunError(
                f"{self.name} cannot be reached by ssh: {said}",
                hint=f"`ssh -o BatchMode=yes {self.name} true` must work without a question: a key "
                "without a passphrase or an agent, the host key known; see docs/clusters.md",
            )
        return RunError(
            f"{self.name} cannot start Menma (exit code {code}): {said}",
            hint=f"each machine needs {sys.executable} and {_SOURCE_ROOT} at the same path",
        )

    def let_go(self) -> None:
        """Close the connection's near end: the machine kills what it runs for us."""
        self._given_up = True
        with suppress(OSError):
            self._input.close()

    def end(self, deadline: float) -> None:
        """Wait until ssh has ended; kill it after `deadline` (monotonic seconds)."""
        if self.output.closed:
            return
        while not self._drained and time.monotonic() < deadline:
            self.pump()
            time.sleep(POLL_S)
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self.pump()
        self.output.close()
        self._errors.close()

    def _write(self) -> None:
        while self._outbox:
            self._unsent += self._outbox.popleft()
        if not self._unsent or self._input.closed:
            return
        try:
            sent = os.write(self._input.fileno(), self._unsent)
        except BlockingIOError:
            return
        except OSError:  # it is gone, which its exit tells
            sent = len(self._unsent)
        self._unsent = self._unsent[sent:]

    def _take(self, line: bytes) -> None:
        try:
            message: Any = json.loads(line)
        except ValueError:
            return  # what a login script prints
        if not isinstance(message, dict):
            return
        if "hello" in message:
            self.said_hello = True
            self._print()
        elif "failed" in message:
            self._note_failure(int(message["failed"]))
        elif "ended" in message:
            self._ended = int(message["ended"])
            if self._ended:
                self._note_failure(self._ended)

    def _note_failure(self, code: int) -> None:
        if self._failed is not None and (is_killed(self._failed) or not is_killed(code)):
            return
        self._failed = code
        if code > 128 and code != INTERRUPTED:
            name = signal.Signals(code - 128).name if code - 128 in set(signal.Signals) else ""
            sys.stderr.write(
                f"{self.name}: a process was ended by signal {code - 128} ({name}); out of "
                "memory there?\n"
            )

    def _print(self) -> None:
        while self._words:
            sys.stderr.write(f"[{self.name}] {self._words.popleft()}\n")
        sys.stderr.flush()


def _interface(hosts: Sequence[Host]) -> str | None:
    """Return this machine's interface towards the others."""
    for host in (*hosts[1:], hosts[0]):
        found = interface_towards(host.name)
        if found is not None:
            return found
    return None
