"""Two machines in one: network namespaces with a cable between them, and an address each."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.project import Outcome, Project, command, environment
from tests.engine.fake_ssh import write_fake_ssh


@dataclass(frozen=True)
class Machine:
    """A namespace of the network, with a host name of its own for what is started in it."""

    namespace: str
    address: str

    @property
    def inside(self) -> list[str]:
        """The command that runs another one on this machine."""
        return ["ip", "netns", "exec", self.namespace, "unshare", "--uts"]

    def shell(self, line: str) -> list[str]:
        """Return a command line that runs `line` in a shell on this machine."""
        return [*self.inside, "sh", "-c", f"hostname {self.namespace}; {line}"]


@dataclass(frozen=True)
class Pair:
    """Two machines, and an ssh from the first to the second."""

    first: Machine
    second: Machine
    ssh: Path

    def hostfile(self, folder: Path, slots: int = 1) -> Path:
        """Write a hostfile of both."""
        path = folder / "hosts"
        lines = [f"{each.address} slots={slots}" for each in (self.first, self.second)]
        path.write_text("# two machines\n" + "\n".join(lines) + "\n")
        return path

    def start(self, project: Project, *arguments: str | Path) -> subprocess.Popen[str]:
        """Start `menma` on the first machine."""
        line = 'exec "$@"'
        return subprocess.Popen(
            [*self.first.shell(line), "menma", *command(arguments)],
            cwd=project.folder,
            env=environment() | {"PATH": f"{self.ssh}{os.pathsep}{os.environ['PATH']}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
        )

    def menma(self, project: Project, *arguments: str | Path) -> Outcome:
        """Run `menma` on the first machine to its end."""
        process = self.start(project, *arguments)
        out, words = process.communicate(timeout=240)
        return Outcome(process.returncode, out, words)

    def pids(self, machine: Machine) -> list[int]:
        """Return the processes in the machine's network."""
        said = _ip(["netns", "pids", machine.namespace])
        return [int(pid) for pid in said.split()]

    def trainers(self, machine: Machine) -> list[int]:
        """Return those of them that belong to a run."""
        return [pid for pid in self.pids(machine) if b"-m\0trainer" in _command_line(pid)]

    def open_sshd(self, folder: Path) -> subprocess.Popen[bytes]:
        """Start OpenSSH's server on the second machine and take its client for the first."""
        folder.mkdir(mode=0o700)
        for name in ("host_key", "key"):
            _run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)])
        (folder / "sshd_config").write_text(
            f"ListenAddress {self.second.address}:2222\nHostKey {folder}/host_key\n"
            f"AuthorizedKeysFile {folder}/key.pub\nPidFile none\nUsePAM no\nStrictModes no\n"
            "PermitRootLogin yes\nPasswordAuthentication no\n"
        )
        (folder / "ssh_config").write_text(
            f"Host {self.second.address}\n  Port 2222\n  IdentityFile {folder}/key\n"
            f"  UserKnownHostsFile {folder}/known\n  StrictHostKeyChecking accept-new\n"
        )
        client, server = shutil.which("ssh"), shutil.which("sshd", path="/usr/sbin:/usr/bin")
        (self.ssh / "ssh").write_text(f'#!/bin/sh\nexec {client} -F {folder}/ssh_config "$@"\n')
        Path("/run/sshd").mkdir(exist_ok=True)
        line = f"exec {server} -D -e -f {folder}/sshd_config"
        return subprocess.Popen(self.second.shell(line), stdin=subprocess.DEVNULL)


def obstacle() -> str:
    """Return why namespaces cannot be made here; empty when they can."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    missing = [name for name in ("ip", "unshare") if shutil.which(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (iproute2, util-linux)"
    name = f"menma-try-{os.getpid()}"
    try:
        _ip(["netns", "add", name])
        _ip(["netns", "del", name])
    except subprocess.CalledProcessError as error:
        return f"no namespaces here: {error.stderr.strip()}"
    return ""


@contextmanager
def two_machines(folder: Path) -> Iterator[Pair]:
    """Make both machines; at the end whatever still runs on them is killed and they are gone."""
    mark = f"{os.getpid()}"
    first = Machine(f"menma-a-{mark}", "10.77.31.1")
    second = Machine(f"menma-b-{mark}", "10.77.31.2")
    ssh = write_fake_ssh(
        folder, prefix=" ".join(second.inside), before=f"hostname {second.namespace}; "
    )
    pair = Pair(first, second, ssh)
    made = []
    try:
        for machine in (first, second):
            _ip(["netns", "add", machine.namespace])
            made.append(machine)
            _ip(["-n", machine.namespace, "link", "set", "lo", "up"])
        _ip(["-n", first.namespace, "link", "add", "cable0", "type", "veth",
             "peer", "name", "cable1", "netns", second.namespace])  # fmt: skip
        for machine, end in ((first, "cable0"), (second, "cable1")):
            _ip(["-n", machine.namespace, "address", "add", f"{machine.address}/24", "dev", end])
            _ip(["-n", machine.namespace, "link", "set", end, "up"])
        yield pair
    finally:
        for machine in made:
            for pid in pair.pids(machine):
                try:
                    os.kill(pid, 9)
                except ProcessLookupError:
                    continue
            _ip(["netns", "del", machine.namespace])


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _ip(arguments: Sequence[str]) -> str:
    return _run(["ip", *arguments])


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout
