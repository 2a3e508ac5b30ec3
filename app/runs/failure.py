"""Why a run or a job failed, as far as the disk tells, and what to try."""

from __future__ import annotations

import json
import re
import shlex
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from app.runs.control import events_of_start
from app.runs.follow import tail_events
from app.runs.launch import console_tail
from app.runs.state import RunState, State
from app.runs.status import Status, read_status
from trainer.contract.run_dir import RunDir

BAD = frozenset({State.FAILED, State.LOST})
NUM_LINES = 30
"""Last lines of the console that are shown."""
_RAISED = re.compile(r"(\[\S+\] ?)?[A-Za-z_][\w.]*(Error|Exception|Interrupt|Exit)\b")
"""The last line of a traceback; processes may be named before it."""
_CODES = {
    1: ": the run or the machine failed, not the input",
    2: ": something in the input is wrong",
    3: ": another process held the run",
}
_CAUSES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        r"out of memory \(RAM\)|host is out of memory|\bMemoryError\b",
        (
            "the machine's memory (RAM) was full: close other programs; blocks in",
            "memory.blocks_to_swap and memory.offload_checkpoints are kept there",
        ),
    ),
    (
        r"OutOfMemoryError|CUDA out of memory|CUDA error: out of memory",
        (
            "the GPU's memory was full: more memory.blocks_to_swap, a smaller dataset resolution",
            "or fewer target_frames; `menma estimate CONFIG` shows what takes it",
        ),
    ),
    (r"signal 9\b", ("mostly that is the machine's memory (RAM): `dmesg` says so",)),
    (
        r"No space left on device|Disk quota exceeded",
        ("free space on the disk, or lower checkpoint.keep_last",),
    ),
    (
        r"not finite|became NaN|NaN or inf",
        ("a lower optimizer.learning_rate; look at the clips that the message names",),
    ),
    (r"exit code 2\b", ("`menma check CONFIG` lists everything that is wrong at once",)),
)
"""What is said of a cause -> what to do where the error brings no hint of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What failed, what speaks for which cause, and what to do."""

    name: str
    what: str
    why: tuple[str, ...]
    """Each a fact that was left behind, the most telling one first."""
    try_next: tuple[str, ...]
    lines: tuple[str, ...] = ()
    """The last ones of the console."""
    files: tuple[str, ...] = ()
    """Where the rest is."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "what": self.what,
            "why": list(self.why),
            "try": list(self.try_next),
            "console": list(self.lines),
            "files": list(self.files),
        }

    def text(self) -> str:
        """Return it for people."""
        parts = [
            ("What failed", [self.what]),
            ("Why we think so", self.why),
            ("What to try", self.try_next),
            ("Last lines of the console", self.lines),
            ("Files", self.files),
        ]
        return "\n\n".join(
            f"{title}\n" + "\n".join(f"  {line}" for line in lines)
            for title, lines in parts
            if lines
        )


def read_failure(
    run: RunDir, state: RunState, *, name: str = "", command: str = ""
) -> Failure | None:
    """Return why a run or a job failed; None where it did not.

    Args:
        run: the run directory, or the folder of a job.
        state: as `read_state` told it.
        name: of the job; empty: the run's.
        command: the command that it was; empty: as the run directory has it.
    """
    if state.state not in BAD:
        return None
    status = read_status(run)
    events = events_of_start(run, status) if status is not None else tail_events(run.events)
    lines = tuple(console_tail(run, NUM_LINES))
    error = next((event for event in reversed(events) if event["type"] == "error"), {})
    why = tuple(_facts(state, status, error, lines))
    at = f" at step {state.step}" if state.step is not None else ""
    name = name or state.name
    verb = "was lost" if state.state is State.LOST else "failed"
    reason = f": {_first(state.why)}" if state.why else ""
    said = "\n".join((*why, *lines))
    return Failure(
        name=name,
        what=f"{name} {verb}{at}{reason}",
        why=why,
        try_next=tuple(_advice(run, error, said, command or command_of(run))),
        lines=lines,
        files=tuple(str(file) for file in (run.console, run.events, run.config) if file.exists()),
    )


def command_of(run: RunDir) -> str:
    """Return the command line that started a run, as it can be typed again; empty: not known."""
    try:
        content = json.loads(run.command.read_text(encoding="utf-8"))
        return f"cd {shlex.quote(content['cwd'])}\n{shlex.join(content['argv'])}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _facts(
    state: RunState, status: Status | None, error: Mapping[str, Any], lines: tuple[str, ...]
) -> Iterator[str]:
    if error.get("message"):
        yield f"the trainer says: {_first(str(error['message']))}"
    if status is not None:
        if status.reason:
            yield f"its supervisor saw: {status.reason}"
        if status.signal is not None:
            yield f"it was ended by signal {status.signal}{_signal_name(status.signal)}"
        elif status.exit_code:
            yield f"exit code {status.exit_code}{_CODES.get(status.exit_code, '')}"
        if status.ended is None and state.state is State.FAILED:
            yield "nobody wrote down its end: its supervisor was killed, too"
    elif state.state is State.FAILED:
        yield "no supervisor ever wrote into its folder"
    if state.state is State.LOST:
        yield f"its last sign of life is of another start of this machine: {state.why}"
    if not error.get("message"):
        # The last line of a traceback names the exception.
        raised = next((line for line in reversed(lines) if _RAISED.match(line)), "")
        if raised:
            yield f"the console ends with: {_first(raised)}"


def _advice(run: RunDir, error: Mapping[str, Any], said: str, command: str) -> Iterator[str]:
    if error.get("hint"):
        yield from str(error["hint"]).splitlines()
    else:
        yield from next((lines for words, lines in _CAUSES if re.search(words, said)), ())
    if command:
        resumes = run.checkpoints.is_dir() and any(run.checkpoints.glob("step-*"))
        yield (
            "the same command, which goes on from the last checkpoint:"
            if resumes
            else ("when that is mended, the same command:")
        )
        yield from (f"  {line}" for line in command.splitlines())
    yield "`menma doctor` looks at the machine"


def _signal_name(number: int) -> str:
    return f" ({signal.Signals(number).name})" if number in set(signal.Signals) else ""


def _first(text: str) -> str:
    return text.strip().partition("\n")[0][:400]
