"""Jobs that a job starts: events pass through, failures and interruptions end them."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from trainer.contract.errors import RunError
from trainer.contract.jobs import TrainRequest
from trainer.jobs import child
from trainer.jobs.child import run_job

Events = list[tuple[str, dict[str, Any]]]


def recording(events: Events) -> Any:
    return lambda kind, /, **fields: events.append((kind, fields))


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replace the trainer by a script; return the processes that were started."""
    started: list[subprocess.Popen[str]] = []
    popen = subprocess.Popen

    def use(script: str) -> list[subprocess.Popen[str]]:
        def start(command: list[str], **options: Any) -> subprocess.Popen[str]:
            assert command[1:4] == ["-m", "trainer", "train"]
            process = popen([sys.executable, "-c", script], **options)
            started.append(process)
            return process

        monkeypatch.setattr(child.subprocess, "Popen", start)
        return started

    return use


def request(tmp_path: Any) -> dict[str, Any]:
    return {
        "name": "train",
        "request": TrainRequest(config=tmp_path / "missing.toml"),
        "request_file": tmp_path / "requests" / "train.json",
    }


def test_events_pass_through_without_the_fields_of_the_codec(play, tmp_path):
    play(
        'print(\'{"v": 1, "time": 2.5, "type": "step", "step": 1}\')\n'
        'print(\'{"v": 1, "time": 3.5, "type": "end", "reason": "done"}\')'
    )
    events: Events = []
    end = run_job(**request(tmp_path), emit=recording(events))
    assert events == [("step", {"step": 1}), ("end", {"reason": "done"})]
    assert end == {"reason": "done"}


def test_what_a_library_prints_among_the_events_goes_to_the_words(play, tmp_path, capsys):
    play(
        "print('12 warnings')\n"
        "print('7')\n"
        'print(\'{"v": 1, "time": 2.5, "type": "end", "reason": "done"}\')'
    )
    events: Events = []
    assert run_job(**request(tmp_path), emit=recording(events)) == {"reason": "done"}
    assert events == [("end", {"reason": "done"})]
    assert capsys.readouterr().err == "12 warnings\n7\n"


@pytest.mark.parametrize(("threads", "expected"), [(None, None), (3, "3")])
def test_the_number_of_threads_is_passed_on(play, tmp_path, monkeypatch, threads, expected):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    play(
        "import json, os\n"
        "print(json.dumps({'type': 'log', 'message': os.environ.get('OMP_NUM_THREADS')}))"
    )
    events: Events = []
    run_job(**request(tmp_path), emit=recording(events), threads=threads)
    assert events == [("log", {"message": expected})]


def test_a_job_whose_events_nobody_takes_is_ended(play, tmp_path):
    started = play(
        'import time\nprint(\'{"type": "log", "message": "on"}\', flush=True)\ntime.sleep(60)'
    )

    def refuse(kind: str, /, **fields: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(**request(tmp_path), emit=refuse)
    assert started[0].returncode not in {None, 0}


@pytest.mark.slow
@pytest.mark.usefixtures("warm_processes")
def test_a_failed_job_is_told_with_its_own_words(tmp_path):
    events: Events = []
    with pytest.raises(RunError, match="train failed") as caught:
        run_job(**request(tmp_path), emit=recording(events))
    kind, fields = events[-1]
    assert kind == "error"
    assert "missing.toml" in fields["message"]
    assert "trainer train" in str(caught.value.hint)
