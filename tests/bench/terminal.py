"""What the app costs in a terminal: `python -m tests.bench.terminal [NAME…]`.

Each figure is measured from outside: the real command in a pseudo-terminal of 80 x 24 characters,
its bytes counted where a terminal would read them, its processor time as the system accounts it.
Processor seconds hold on a busy machine, too; wall-clock seconds only on an idle one.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from app.runs.lock import RunLock
from app.runs.processes import ProcessId, boot_id, host_name
from app.runs.status import Status
from trainer.contract.events import EventWriter, encode
from trainer.contract.run_dir import RunDir

ROOT = Path(__file__).parents[2]
SIZE = (80, 24)
LONG = 100_000
NUM_RUNS = 20
STEPS_PER_S = 2.0
SETTLE_S, WATCH_S = 5.0, 30.0
TIMEOUT_S = 120.0
BRAILLE = b"\xe2[\xa0-\xa3][\x80-\xbf]"
"""A character of a curve."""
CURSOR = b"read single steps"
"""Is there once all events have been read."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured value and the most that it may be."""

    name: str
    what: str
    value: float
    limit: float | None = None
    unit: str = "s"

    def line(self) -> str:
        """Return it as one line of JSON."""
        holds = None if self.limit is None else self.value <= self.limit
        return json.dumps(
            {
                "name": self.name,
                "what": self.what,
                "value": round(self.value, 3),
                "unit": self.unit,
                "limit": self.limit,
                "holds": holds,
            }
        )


class Terminal:
    """A process in a pseudo-terminal whose output is counted and read by nobody.

    Args:
        arguments: of `menma`.
        folder: where it works.
        size: columns and rows.
    """

    def __init__(self, arguments: list[str], folder: Path, size: tuple[int, int] = SIZE) -> None:
        self._master, slave = pty.openpty()
        columns, rows = size
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.began = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "app", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=folder,
            env=_environment(folder),
            start_new_session=True,
        )
        os.close(slave)
        self.num_bytes = 0
        self._seen = b""

    def wait_for(self, words: bytes) -> None:
        """Read until the pattern has been written since the last wait.

        Raises:
            TimeoutError: it does not come; the message has what came instead.
        """
        deadline = time.monotonic() + TIMEOUT_S
        while re.search(words, self._seen) is None:
            if time.monotonic() > deadline or not self._read(0.5):
                raise TimeoutError(f"{words!r} did not come: {self._seen[-2000:]!r}")
        self._seen = b""

    def watch(self, seconds: float) -> None:
        """Read for so long."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._read(left)
        self._seen = b""

    def press(self, keys: str) -> None:
        """Type."""
        os.write(self._master, keys.encode())

    def cpu_s(self) -> float:
        """Return the processor time of the process so far."""
        times = psutil.Process(self._process.pid).cpu_times()
        return times.user + times.system

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        while self._process.poll() is None:
            self._read(0.1)
        os.close(self._master)

    def _read(self, timeout_s: float) -> bool:
        ready, _, _ = select.select([self._master], [], [], max(timeout_s, 0.0))
        if not ready:
            return self._process.poll() is None
        try:
            content = os.read(self._master, 65536)
        except OSError:  # the other end is closed
            return False
        self.num_bytes += len(content)
        self._seen += content
        return True


def first_paint(folder: Path) -> Iterator[Figure]:
    """Measure the time until the list is on the screen."""
    wall, cpu = [], []
    for _ in range(5):
        with _terminal([], folder) as terminal:
            terminal.wait_for(b"JOBS")
            wall.append(time.monotonic() - terminal.began)
            cpu.append(terminal.cpu_s())
    yield Figure("first_paint_cpu", "`menma`: processor time to the first picture", min(cpu), 0.6)
    yield Figure("first_paint", "the same, wall clock, best of 5", min(wall), 0.6)


def runs_list(folder: Path) -> Iterator[Figure]:
    """Measure `menma runs list --json` over runs with long logs."""
    for number in range(NUM_RUNS):
        _write_run(RunDir(folder / "runs" / f"run-{number:02d}"), 2_000)
    wall, cpu = [], []
    for _ in range(5):
        before, began = _children_cpu_s(), time.monotonic()
        command = [sys.executable, "-m", "app", "runs", "list", "--json"]
        done = subprocess.run(
            command, cwd=folder, env=_environment(folder), capture_output=True, check=True
        )
        wall.append(time.monotonic() - began)
        cpu.append(_children_cpu_s() - before)
    assert len(json.loads(done.stdout)) >= NUM_RUNS
    what = f"`menma runs list --json`, {NUM_RUNS} runs: processor time"
    yield Figure("runs_list_cpu", what, min(cpu), 0.3)
    yield Figure("runs_list", "the same, wall clock, best of 5", min(wall), 0.3)


def long_run(folder: Path) -> Iterator[Figure]:
    """Measure the opening of a run of 100,000 steps, from the key to the whole curve."""
    run = RunDir(folder / "runs" / "long")
    _write_run(run, LONG)
    figures: dict[str, list[float]] = {name: [] for name in ("shape_cpu", "shape", "cpu", "wall")}
    for _ in range(3):
        with _terminal([], folder) as terminal:
            terminal.wait_for(b"100000/100000")
            cpu, wall = terminal.cpu_s(), time.monotonic()
            terminal.press("\r")
            for names, words in ((("shape_cpu", "shape"), BRAILLE), (("cpu", "wall"), CURSOR)):
                terminal.wait_for(words)
                figures[names[0]].append(terminal.cpu_s() - cpu)
                figures[names[1]].append(time.monotonic() - wall)
    what = "run of 100,000 steps, from enter to its curve: processor time"
    yield Figure("long_run_cpu", what, min(figures["shape_cpu"]), 1.0)
    yield Figure("long_run", "the same, wall clock, best of 3", min(figures["shape"]), 1.0)
    what = "and to the last of its values: processor time"
    yield Figure("long_run_whole_cpu", what, min(figures["cpu"]))
    yield Figure("long_run_whole", "the same, wall clock, best of 3", min(figures["wall"]))


def monitor(folder: Path) -> Iterator[Figure]:
    """Measure the monitor of a run that makes two steps a second."""
    yield from _live(folder, SIZE, "monitor", cpu_limit=3.0, bytes_limit=25.0)


def monitor_large(folder: Path) -> Iterator[Figure]:
    """Measure the same in a large window, for information."""
    yield from _live(folder, (200, 50), "monitor_large")


def _live(
    folder: Path,
    size: tuple[int, int],
    name: str,
    *,
    cpu_limit: float | None = None,
    bytes_limit: float | None = None,
) -> Iterator[Figure]:
    run = RunDir(folder / "runs" / "live")
    with _living(run), _terminal([], folder, size) as terminal:
        terminal.wait_for(b"running")
        terminal.press("\r")
        terminal.wait_for(CURSOR)
        terminal.watch(SETTLE_S)
        cpu, num_bytes, began = terminal.cpu_s(), terminal.num_bytes, time.monotonic()
        terminal.watch(WATCH_S)
        wall = time.monotonic() - began
        cpu, num_bytes = terminal.cpu_s() - cpu, terminal.num_bytes - num_bytes
    where = f"monitor at {size[0]} x {size[1]}, 2 steps/s"
    yield Figure(f"{name}_cpu", f"{where}: share of one core", 100 * cpu / wall, cpu_limit, "%")
    rate = num_bytes / 1024 / wall
    yield Figure(f"{name}_bytes", f"{where}: bytes to the terminal", rate, bytes_limit, "KiB/s")


BENCHMARKS: dict[str, Callable[[Path], Iterator[Figure]]] = {
    "first_paint": first_paint,
    "runs_list": runs_list,
    "long_run": long_run,
    "monitor": monitor,
    "monitor_large": monitor_large,
}


@contextmanager
def _terminal(
    arguments: list[str], folder: Path, size: tuple[int, int] = SIZE
) -> Iterator[Terminal]:
    terminal = Terminal(arguments, folder, size)
    try:
        yield terminal
    finally:
        terminal.close()


@contextmanager
def _living(run: RunDir) -> Iterator[None]:
    """Make steps in a run, as a trainer does, until the block ends."""
    _write_run(run, 500, total_steps=10_000, ended=False)
    lock = RunLock.acquire(run.lock)
    ours = ProcessId.of(os.getpid())
    Status(
        supervisor=ours, trainer=ours, boot_id=boot_id(), host=host_name(), started=time.time() - 60
    ).write(run)
    emit, over = EventWriter(run.events), threading.Event()

    def step() -> None:
        number = 500
        while not over.wait(1 / STEPS_PER_S):
            number += 1
            emit("step", **_step(number, 10_000))

    thread = threading.Thread(target=step)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        lock.release()


def _write_run(
    run: RunDir, steps: int, *, total_steps: int | None = None, ended: bool = True
) -> None:
    run.root.mkdir(parents=True, exist_ok=True)
    total = total_steps or steps
    with run.events.open("w", encoding="utf-8") as file:
        for number in range(1, steps + 1):
            file.write(encode("step", **_step(number, total)))
            if number % 100 == 0 and steps < LONG:
                file.write(encode("validation", step=number, loss=0.2 + 1 / number))
        if ended:
            file.write(encode("end", reason="done", step=steps))


def _step(number: int, total: int) -> dict[str, object]:
    """Return the figures of a step: they fall, with noise that is the same each time."""
    noise = (number * 2654435761 % 2**32) / 2**32
    loss = 0.1 + 0.9 / (1 + number / 200) + 0.1 * noise
    return {
        "step": number, "total_steps": total, "epoch": round(number / 1000, 4),
        "loss": round(loss, 6), "terms": {"flow_matching": round(loss, 6)}, "lr": 1e-4,
        "grad_norm": round(0.5 + noise, 4), "step_time_s": 0.5,
        "eta_s": round((total - number) * 0.5, 1), "rss_gib": 3.25, "peak_vram_gib": 17.5,
    }  # fmt: skip


def _environment(folder: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SSH_")}
    kept.pop("COLORTERM", None)
    kept.pop("NO_COLOR", None)
    return kept | {
        "PYTHONPATH": str(ROOT),
        "TERM": "xterm-256color",
        "XDG_STATE_HOME": str(folder / "state"),
        "XDG_CONFIG_HOME": str(folder / "config"),
    }


def _children_cpu_s() -> float:
    times = os.times()
    return times.children_user + times.children_system


def main(names: list[str]) -> int:
    """Print the figures; return 1 where a limit does not hold."""
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        sys.stderr.write(f"unknown: {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}\n")
        return 2
    code = 0
    for name in names or BENCHMARKS:
        with tempfile.TemporaryDirectory() as folder:
            for figure in BENCHMARKS[name](Path(folder)):
                print(figure.line(), flush=True)
                code |= figure.limit is not None and figure.value > figure.limit
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
