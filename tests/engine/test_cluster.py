"""One run on two "machines", the second behind a stand-in for ssh. No torch is involved."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.engine.fake_ssh import write_fake_ssh
from tests.engine.test_launch import all_gone, send_and_wait
from trainer.contract.errors import ConfigError, RunError
from trainer.contract.hostfile import Host
from trainer.engine import addresses, node
from trainer.engine.cluster import require_first_here, ssh_command, told_on

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="several machines need Linux")
ROOT = Path(__file__).parents[2]
HERE = socket.gethostname()

WORKER = """
import json, os, signal, subprocess, sys, time
folder, mode = sys.argv[1:3]
rank = int(os.environ["RANK"])
names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "MENMA_RENDEZVOUS",
         "NCCL_DEBUG", "CUDA_VISIBLE_DEVICES", "SECRET"]
seen = {name: os.environ.get(name) for name in names}
seen |= {"pid": os.getpid(), "agent": os.getppid(), "cwd": os.getcwd(), "signals": []}
def note(number, frame):
    seen["signals"].append(number)
    write()
    if mode == "polite" or (mode == "second" and len(seen["signals"]) == 2):
        sys.exit(130)
def write():
    path = os.path.join(folder, f"{rank}.json")
    open(path + ".new", "w").write(json.dumps(seen))
    os.replace(path + ".new", path)
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, note)
os.write(2, f"a word of rank {rank}\\n".encode())
write()
def all_have_begun():
    while not all(os.path.exists(os.path.join(folder, f"{other}.json")) for other in range(4)):
        time.sleep(0.01)
if mode == "ok":
    sys.exit(0)
if mode == "remote fails" and rank == 3:
    all_have_begun()
    sys.exit(3)
if mode == "remote is killed" and rank == 2:
    all_have_begun()
    os.kill(os.getpid(), signal.SIGKILL)
if mode == "local fails" and rank == 1:
    all_have_begun()
    sys.exit(4)
while True:
    time.sleep(0.05)
"""

LAUNCHER = """
import sys
from pathlib import Path
from trainer.contract.errors import MenmaError
from trainer.contract.hostfile import Host
from trainer.engine.cluster import run_cluster
folder, mode, here, other, grace = sys.argv[1:6]
command = [sys.executable, "-c", open(folder + "/worker.py").read(), folder, mode]
hosts = [Host(here, 2, 1), Host(other, 2, 2)]
try:
    needed = Path(folder) / "worker.py"
    # Whose processes end by themselves once they are told need no grace that ends them.
    patience_s = 600.0 if mode in {"polite", "second"} else 0.5
    graces = {"failure_grace_s": patience_s, "stop_grace_s": float(grace)}
    sys.exit(run_cluster(command, hosts, needed, **graces))
except MenmaError as error:
    sys.stderr.write(f"error: {error}")
    sys.exit(error.exit_code)
"""


def launch(folder: Path, mode: str, *, other: str = "node2", grace_s: float = 600):
    (folder / "worker.py").write_text(WORKER)
    path = write_fake_ssh(folder)
    environment = os.environ | {
        "PATH": f"{path}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "NCCL_DEBUG": "WARN",
        "CUDA_VISIBLE_DEVICES": "7",
        "SECRET": "do not tell",
    }
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(folder), mode, HERE, other, str(grace_s)],
        cwd=folder,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def job_in(folder: str, needed: str) -> node.NodeJob:
    return node.NodeJob(
        command=["x"], folder=folder, needed=needed, environment={}, first_rank=0, slots=1,
        world_size=1, address="a", port=1, failure_grace_s=1, stop_grace_s=1,
    )  # fmt: skip


def start(folder: Path, mode: str, **options):
    process = launch(folder, mode, **options)
    deadline = time.monotonic() + 120
    while not all_there(folder):
        assert time.monotonic() < deadline
        # The look at the files comes after the one at the process: its last acts count.
        if process.poll() is not None and not all_there(folder):
            raise AssertionError(process.communicate()[1])
        time.sleep(0.02)
    return process


def all_there(folder: Path) -> bool:
    return all((folder / f"{rank}.json").exists() for rank in range(4))


def seen(folder: Path) -> list[dict]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(4)]


def nobody_is_left(folder: Path) -> bool:
    processes = seen(folder)
    return all_gone([s["pid"] for s in processes] + [s["agent"] for s in processes[2:]])


def end(process) -> tuple[int, str]:
    words = process.communicate(timeout=120)[1]
    return process.returncode, words


def test_ranks_go_on_from_machine_to_machine(tmp_path):
    code, words = end(launch(tmp_path, "ok"))
    assert code == 0, words
    ranks = seen(tmp_path)
    place = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    assert [tuple(s[name] for name in place) for s in ranks] == [
        ("0", "4", "0"), ("1", "4", "1"), ("2", "4", "0"), ("3", "4", "1")
    ]  # fmt: skip
    assert {s["MASTER_ADDR"] for s in ranks} == {HERE}
    assert len({s["MASTER_PORT"] for s in ranks}) == 1
    assert {s["cwd"] for s in ranks} == {str(tmp_path)}
    assert all(s["MENMA_RENDEZVOUS"] is None for s in ranks)
    # What counts for all is told on, what is of one machine or secret is not.
    assert {s["NCCL_DEBUG"] for s in ranks} == {"WARN"}
    assert [s["CUDA_VISIBLE_DEVICES"] for s in ranks] == ["7", "7", None, None]
    assert [s["SECRET"] for s in ranks] == ["do not tell"] * 2 + [None] * 2
    assert "[node2] a word of rank 2\n" in words
    assert "\na word of rank 0\n" in f"\n{words}"
    assert "Welcome" not in words
    called = (tmp_path / "ssh.log").read_text()
    assert called.startswith("node2 env PYTHONPATH=")
    assert "secret" not in called.lower()


def test_the_code_is_that_of_the_remote_process_that_failed(tmp_path):
    code, words = end(start(tmp_path, "remote fails"))
    assert code == 3, words
    assert nobody_is_left(tmp_path)


def test_a_remote_process_that_is_killed_is_told_with_its_machine(tmp_path):
    code, words = end(start(tmp_path, "remote is killed"))
    assert code == 128 + signal.SIGKILL
    assert "node2: a process was ended by signal 9 (SIGKILL)" in words
    assert nobody_is_left(tmp_path)


def test_a_failure_here_ends_the_others(tmp_path):
    code, _ = end(start(tmp_path, "local fails"))
    assert code == 4
    assert nobody_is_left(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_machine_once(tmp_path, number):
    process = start(tmp_path, "polite")
    process.send_signal(number)
    assert end(process)[0] == 130
    assert [s["signals"] for s in seen(tmp_path)] == [[number]] * 4


def test_the_second_signal_is_passed_on_too(tmp_path):
    process = start(tmp_path, "second")
    send_and_wait(process, lambda: seen(tmp_path))
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 130
    assert [s["signals"] for s in seen(tmp_path)] == [[signal.SIGTERM] * 2] * 4


def test_the_third_signal_kills_everywhere(tmp_path):
    process = start(tmp_path, "deaf")
    for _ in range(2):
        send_and_wait(process, lambda: seen(tmp_path))
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 130
    assert nobody_is_left(tmp_path)


def test_who_does_not_stop_is_killed_after_the_grace(tmp_path):
    process = start(tmp_path, "deaf", grace_s=1)
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 130
    assert nobody_is_left(tmp_path)


def test_nobody_outlives_a_killed_launcher(tmp_path):
    process = start(tmp_path, "deaf")
    process.kill()
    end(process)
    assert nobody_is_left(tmp_path)


def test_a_connection_that_breaks_off_ends_the_run(tmp_path):
    process = start(tmp_path, "deaf")
    agent = seen(tmp_path)[2]["agent"]
    os.kill(agent, signal.SIGKILL)
    code, words = end(process)
    assert code == 1
    assert "the ssh connection to node2 broke off" in words
    assert nobody_is_left(tmp_path)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ("unreachable", "unreachable cannot be reached by ssh: ssh: connect to host unreachable "),
        ("bare", "bare cannot start Menma (exit code 127): env: '/opt/python': No such file"),
    ],
)
def test_a_machine_that_cannot_be_used_is_named(tmp_path, other, words):
    code, said = end(launch(tmp_path, "ok", other=other))
    assert code == 1
    assert words in said
    assert not (tmp_path / "0.json").exists()  # nothing was started here


def test_an_agent_that_hears_nothing_gives_up(monkeypatch):
    monkeypatch.setattr(node, "SILENCE_S", 0.2)
    reading, writing = os.pipe()
    with pytest.raises(node._Abandoned):
        node._read_job(node.Lines(reading))
    os.close(writing)
    with pytest.raises(node._Abandoned):
        node._read_job(node.Lines(reading))
    os.close(reading)


def test_what_a_machine_does_not_see_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(node, "SEEN_WITHIN_S", 0)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").touch()
    assert node._enter(job_in(str(tmp_path), needed=str(tmp_path / "here"))) is None
    missing = str(tmp_path / "missing")
    assert node._enter(job_in(str(tmp_path), needed=missing)) == missing
    assert node._enter(job_in(missing, needed=str(tmp_path / "here"))) == missing


def test_a_signal_before_the_job_is_kept():
    job = job_in("/", needed="/x")
    reading, writing = os.pipe()
    os.write(writing, b"15\n" + job.to_line())
    assert node._read_job(node.Lines(reading)) == (job, [b"15"])
    os.close(writing)
    os.close(reading)


def test_the_command_line_is_quoted_for_the_shell_there():
    *options, host, remote = ssh_command("node2", {"PYTHONPATH": "/a folder/x; exit 3"})
    assert host == "node2"
    assert "BatchMode=yes" in options
    script = remote.replace(" -m trainer.engine.node", " -c 'import sys; print(sys.path)'")
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    assert "'/a folder/x; exit 3'" in done.stdout


def test_the_first_machine_must_be_this_one_by_a_name_that_others_can_use():
    require_first_here([Host(HERE, 1, 1), Host("node2", 1, 2)])
    with pytest.raises(ConfigError, match=r"192\.0\.2\.77, is not this one"):
        require_first_here([Host("192.0.2.77", 1, 1), Host("node2", 1, 2)])
    with pytest.raises(ConfigError, match="localhost means another machine"):
        require_first_here([Host("localhost", 1, 1), Host("node2", 1, 2)])


def test_what_is_told_on():
    environment = {"NCCL_X": "1", "MENMA__TRAINING__SEED": "2", "MENMA_RENDEZVOUS": "file:///x"}
    told = told_on(environment | {"HOME": "/root", "CUDA_VISIBLE_DEVICES": "0", "PATH": "/bin"})
    assert told == {"NCCL_X": "1", "MENMA__TRAINING__SEED": "2", "PATH": "/bin"}


def test_own_addresses():
    assert addresses.is_this_machine("127.0.0.1")
    assert addresses.is_this_machine(HERE)
    assert not addresses.is_this_machine("no-such-machine.invalid")
    assert addresses.interface_towards("127.0.0.1") is None
    assert addresses.interface_towards("no-such-machine.invalid") is None
    port = addresses.free_port()
    with socket.socket() as probe:
        probe.bind(("", port))


def test_without_ssh_it_says_so(monkeypatch):
    from trainer.engine.cluster import run_cluster

    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(RunError, match="ssh is not on the PATH"):
        run_cluster(["x"], [Host(HERE, 1, 1), Host("node2", 1, 2)], Path("x"))
