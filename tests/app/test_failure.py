"""Why a run failed: from its last words, its status, its console."""

from __future__ import annotations

import json
import os
import time

import pytest

from app.runs.failure import read_failure
from app.runs.printable import printable
from app.runs.processes import ProcessId, boot_id, host_name
from app.runs.state import read_state
from app.runs.status import Status
from trainer.contract.events import EventWriter
from trainer.contract.run_dir import RunDir

TRACEBACK = """\
Traceback (most recent call last):
  File "x.py", line 3, in <module>
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.
"""


def failed(tmp_path, *, console="", error=None, checkpoint=False, **how):
    run = RunDir(tmp_path / "runs" / "fish")
    emit = EventWriter(run.events)
    emit("step", step=7, total_steps=9, loss=1.0)
    if error is not None:
        emit("error", **error)
    run.console.write_text(console, encoding="utf-8")
    run.command.write_text(json.dumps({"argv": ["menma", "train", "a b.toml"], "cwd": "/x y"}))
    if checkpoint:
        (run.checkpoints / "step-00000005").mkdir(parents=True)
    gone = ProcessId(os.getpid(), 1.0)
    status = Status(
        supervisor=gone, trainer=gone, boot_id=boot_id(), host=host_name(),
        started=time.time() - 60, events_from=0, **({"ended": time.time()} | how),
    )  # fmt: skip
    status.write(run)
    return run


@pytest.mark.parametrize(
    ("facts", "why", "advice"),
    [
        (
            {"console": TRACEBACK, "exit_code": 1},
            "the console ends with: torch.OutOfMemoryError: CUDA out of memory.",
            "memory.blocks_to_swap",
        ),
        (
            {"signal": 9, "reason": "the machine ran out of memory (RAM) and the kernel killed it"},
            "its supervisor saw: the machine ran out of memory (RAM)",
            "machine's memory (RAM) was full",
        ),
        ({"signal": 9}, "ended by signal 9 (SIGKILL)", "dmesg"),
        ({"exit_code": 2}, "exit code 2: something in the input is wrong", "menma check CONFIG"),
        ({"ended": None}, "nobody wrote down its end", "menma doctor"),
        (
            {"exit_code": 1, "console": "OSError: [Errno 28] No space left on device\n"},
            "No space left on device",
            "checkpoint.keep_last",
        ),
        (
            {"exit_code": 1, "error": {"message": "it broke", "hint": "mend\nthis"}},
            "the trainer says: it broke",
            "mend",
        ),
    ],
)
def test_a_failure_has_its_cause_and_what_to_try(tmp_path, facts, why, advice):
    run = failed(tmp_path, **facts)
    found = read_failure(run, read_state(run))
    assert found is not None
    assert found.what.startswith("fish failed at step 7")
    assert any(why in line for line in found.why), found.why
    assert any(advice in line for line in found.try_next), found.try_next
    assert "  cd '/x y'" in found.try_next
    assert "  menma train 'a b.toml'" in found.try_next
    assert str(run.console) in found.files
    assert "What to try" in found.text()


def test_a_hint_of_the_trainer_stands_instead_of_ours_and_a_checkpoint_is_gone_on_from(tmp_path):
    error = {"message": "out of memory: CUDA out of memory", "hint": "only this"}
    run = failed(tmp_path, error=error, exit_code=1, checkpoint=True)
    found = read_failure(run, read_state(run))
    assert found.try_next[0] == "only this"
    assert not any("blocks_to_swap" in line for line in found.try_next)
    assert "the same command, which goes on from the last checkpoint:" in found.try_next


def test_what_did_not_fail_has_no_failure(tmp_path):
    run = failed(tmp_path, exit_code=0)
    assert read_failure(run, read_state(run)) is None


def test_runs_show_tells_it_too(menma, tmp_path):
    failed(tmp_path, error={"message": "it broke", "hint": "mend it"}, exit_code=1, console="one\n")
    answer = menma("runs", "show", "fish")
    assert "What to try\n  mend it" in answer.out
    told = json.loads(menma("runs", "show", "fish", "--json").out)["failure"]
    assert told["why"][0] == "the trainer says: it broke"
    assert told["console"] == ["one"]


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("plain\ttext\nline", "plain\ttext\nline"),
        ("\x1b[31mred\x1b[0m \x1b]0;title\x07ends", "red ends"),
        ("10%\r50%\r100%\nnext", "100%\nnext"),
        ("a\r\nb\r\n", "a\nb\n"),
        ("bell\x07 and \x9b31m", "bell and 31m"),
        ("\x1b[2J\x1bc\x1b(Bdone", "done"),
    ],
)
def test_nothing_from_a_file_steers_the_terminal(raw, shown):
    assert printable(raw) == shown
