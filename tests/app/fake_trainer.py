"""Stands in for `python -m trainer`: the same seam, without torch.

Usage: fake_trainer.py MODE JOB REQUEST.json. Modes of the job `train`:

    finish   five steps, an output file, the end
    held     as `finish`, but after its first step it waits for a file `go` in the run directory
    steps    steps until it is asked to stop; obeys requests and signals as the trainer does
    loading  never makes a step; signals act as they do in a plain Python process
    stuck    makes steps, ignores requests and signals
    heard    as `stuck`, but writes a file `heard` into the run directory after a signal
    fail     says what is wrong and ends with exit code 1
    child    as `steps`, with a process of its own in the same group; writes its pid to child.pid

Other jobs record their request as `$FAKE_RECORD` and send the events in `$FAKE_EVENTS`;
with `$FAKE_PID` they write their pid there and go on until they are interrupted.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from trainer.contract.events import EventWriter, encode
from trainer.contract.jobs import REQUESTS
from trainer.contract.run_dir import RunDir, answer_request

STEP_S = 0.05


def train(mode: str, run: RunDir) -> int:
    """Act as a trainer in `run`."""
    emit = EventWriter(run.events)
    print("a word for the console", flush=True)
    if mode == "loading":
        time.sleep(600)
    if mode == "fail":
        emit("error", message="the loss is not a number", hint="look at step 3")
        emit("end", reason="failed", step=3)
        return 1
    signals = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: signals.append(number))
    if mode == "child":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (run.root / "child.pid").write_text(str(child.pid))
    total = 5 if mode in {"finish", "held"} else 10_000
    for step in range(1, total + 1):
        emit(
            "step", step=step, total_steps=total, loss=1 / step, lr=1e-4, step_time_s=STEP_S,
            eta_s=(total - step) * STEP_S,
        )  # fmt: skip
        time.sleep(STEP_S)
        while mode == "held" and not (run.root / "go").exists():
            time.sleep(STEP_S)
        if mode in {"stuck", "heard"}:
            if signals and mode == "heard":
                (run.root / "heard").touch()
            continue
        if len(signals) > 1:
            emit("end", reason="interrupted", step=step)
            return 130
        asked = list(run.pending_requests())
        for path, what in asked:
            emit(what if what == "sample" else "log", message=what, step=step, path="x")
            answer_request(path, step=step)
        if signals or any(what == "stop" for _, what in asked):
            emit("checkpoint", step=step, path="x")
            emit("end", reason="stopped", step=step)
            return 130
    run.output.mkdir(exist_ok=True)
    (run.output / f"{run.root.name}.safetensors").write_bytes(b"weights")
    emit("end", reason="done", step=total)
    return 0


def other_job(job: str, request: dict[str, object]) -> int:
    """Record the request and answer with prepared events."""
    Path(os.environ["FAKE_RECORD"]).write_text(json.dumps({"job": job, "request": request}))
    for event in json.loads(os.environ.get("FAKE_EVENTS", "[]")):
        sys.stdout.write(encode(event.pop("type"), **event))
    print("a word on stderr", file=sys.stderr, flush=True)
    if "FAKE_PID" in os.environ:  # a job that takes its time
        Path(os.environ["FAKE_PID"]).write_text(str(os.getpid()))
        try:
            time.sleep(600)
        except KeyboardInterrupt:
            return 130
    return int(os.environ.get("FAKE_CODE", "0"))


def main() -> int:
    """Check the request as the trainer does, then act."""
    mode, job, path = sys.argv[1:4]
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    REQUESTS[job].model_validate(content)
    return train(mode, RunDir(Path(path).parent)) if job == "train" else other_job(job, content)


if __name__ == "__main__":
    sys.exit(main())
