"""Processes start with the right environment, and all end together. No torch is involved."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.engine.launch import Workers, run_workers, worker_environment

ROOT = Path(__file__).parents[2]

WORKER = """
import json, os, signal, subprocess, sys, time
folder, mode = sys.argv[1:3]
rank = int(os.environ["RANK"])
names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MENMA_RENDEZVOUS", "EXTRA"]
seen = {name: os.environ.get(name) for name in names}
seen |= {"pid": os.getpid(), "session": os.getsid(0), "signals": []}
if mode == "children":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    seen["child"] = child.pid
def note(number, frame):
    seen["signals"].append(number)
    write()
    if mode == "polite" or (mode == "second" and len(seen["signals"]) == 2):
        sys.exit(5 if mode == "second" else 0)
def write():
    path = os.path.join(folder, f"{rank}.json")
    open(path + ".new", "w").write(json.dumps(seen))
    os.replace(path + ".new", path)
if mode in {"polite", "second", "deaf"}:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
write()
def all_have_begun():
    while not all(os.path.exists(os.path.join(folder, f"{other}.json")) for other in range(2)):
        time.sleep(0.01)
if mode == "ok":
    sys.exit(0)
if mode in {"fails", "children"} and rank == 1:
    all_have_begun()
    sys.exit(3)
if mode == "killed" and rank == 1:
    all_have_begun()
    os.kill(os.getpid(), signal.SIGSEGV)
while True:
    time.sleep(0.05)
"""

LAUNCHER = """
import sys
from trainer.engine.launch import run_workers
folder, mode, grace = sys.argv[1:4]
command = [sys.executable, "-c", open(folder + "/worker.py").read(), folder, mode]
# Whose processes end by themselves once they are told need no grace that ends them.
patience_s = 600.0 if mode == "second" else 1.0
sys.exit(run_workers(command, 2, failure_grace_s=patience_s, stop_grace_s=float(grace)))
"""


def start(folder: Path, mode: str, grace: float = 600) -> subprocess.Popen[bytes]:
    (folder / "worker.py").write_text(WORKER)
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(folder), mode, str(grace)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "EXTRA": "kept"},
    )
    deadline = time.monotonic() + 120
    while not all((folder / f"{rank}.json").exists() for rank in range(2)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


def seen(folder: Path) -> list[dict]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):  # the second: it went while we read
        return False
    return stat.rpartition(")")[2].split()[0] not in {"Z", "X"}


def all_gone(pids: list[int], within_s: float = 60) -> bool:
    deadline = time.monotonic() + within_s
    while any(alive(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def send_and_wait(process: subprocess.Popen, read: Callable[[], list[dict]]) -> None:
    """Send SIGTERM, and wait until every process has one more: two at a time would be one."""
    wanted = len(read()[0]["signals"]) + 1
    process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 120
    while not all(len(s["signals"]) == wanted for s in read()):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)


def test_environment_and_success(tmp_path):
    process = start(tmp_path, "ok")
    assert process.wait(120) == 0
    first, second = seen(tmp_path)
    assert [(s["RANK"], s["WORLD_SIZE"], s["LOCAL_RANK"]) for s in (first, second)] == [
        ("0", "2", "0"),
        ("1", "2", "1"),
    ]
    assert first["MENMA_RENDEZVOUS"] == second["MENMA_RENDEZVOUS"]
    assert first["EXTRA"] == "kept"
    assert first["session"] == first["pid"] != second["session"]
    store = Path(first["MENMA_RENDEZVOUS"].removeprefix("file://"))
    assert not store.parent.exists()  # nothing is left in the temporary folder


def test_the_code_is_that_of_the_process_that_failed(tmp_path):
    process = start(tmp_path, "fails")
    assert process.wait(120) == 3
    assert all_gone([s["pid"] for s in seen(tmp_path)])


def test_death_by_a_signal_is_128_and_more(tmp_path):
    assert start(tmp_path, "killed").wait(120) == 128 + signal.SIGSEGV


@pytest.mark.parametrize(
    ("codes", "ours_by_then", "told"),
    [
        ([1, -signal.SIGKILL], False, 137),  # it gave up because the other was gone
        ([1, 128 + signal.SIGKILL], False, 137),  # killed on another machine
        ([1, -signal.SIGKILL], True, 1),  # that one we have killed ourselves
        ([-signal.SIGKILL, 1], False, 137),
        ([3, -signal.SIGABRT, 1], False, 3),
    ],
)
def test_a_killed_process_is_the_cause_even_if_heard_of_later(codes, ours_by_then, told):
    workers = Workers(failure_grace_s=60, stop_grace_s=60)
    workers.note_failure(codes[0])
    if ours_by_then:
        workers.kill()
    for code in codes[1:]:
        workers.note_failure(code)
    assert workers.exit_code() == told


def test_children_of_the_processes_do_not_survive(tmp_path):
    process = start(tmp_path, "children")
    assert process.wait(120) == 3
    assert all_gone([s[key] for s in seen(tmp_path) for key in ("pid", "child")])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_process_once(tmp_path, number):
    process = start(tmp_path, "polite")
    process.send_signal(number)
    assert process.wait(120) == 0
    assert [s["signals"] for s in seen(tmp_path)] == [[number], [number]]


def test_the_second_signal_is_passed_on_too(tmp_path):
    process = start(tmp_path, "second")
    send_and_wait(process, lambda: seen(tmp_path))
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 5
    assert all(s["signals"] == [signal.SIGTERM] * 2 for s in seen(tmp_path))


def test_the_third_signal_kills(tmp_path):
    process = start(tmp_path, "deaf")
    for _ in range(2):
        send_and_wait(process, lambda: seen(tmp_path))
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 130, "not by the grace of 600 seconds"
    assert all_gone([s["pid"] for s in seen(tmp_path)])


def test_who_does_not_stop_is_killed_after_the_grace(tmp_path):
    process = start(tmp_path, "deaf", grace=1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 130
    assert all_gone([s["pid"] for s in seen(tmp_path)])


@pytest.mark.skipif(sys.platform != "linux", reason="a promise of the Linux kernel")
def test_nobody_outlives_a_killed_launcher(tmp_path):
    process = start(tmp_path, "deaf")
    process.kill()
    process.wait(120)
    assert all_gone([s["pid"] for s in seen(tmp_path)])


def test_handlers_are_put_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    assert run_workers([sys.executable, "-c", "pass"], 2) == 0
    assert signal.getsignal(signal.SIGTERM) is before


def test_processes_of_one_machine_talk_over_loopback(tmp_path):
    environment = worker_environment(1, 2, tmp_path / "store")
    if sys.platform == "linux":
        assert environment["GLOO_SOCKET_IFNAME"] == environment["NCCL_SOCKET_IFNAME"] == "lo"


def test_launching_loads_no_torch():
    script = "import trainer.engine.launch, sys; sys.exit('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=ROOT
    )
    assert done.returncode == 0
