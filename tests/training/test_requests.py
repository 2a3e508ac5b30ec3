from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trainer.contract.run_dir import RunDir
from trainer.training import requests as module
from trainer.training.requests import Requested, Requests


class OneRank:
    rank = 0

    def any_rank(self, flag: bool) -> bool:
        return flag


def make(tmp_path: Path) -> tuple[RunDir, Requests, list[str]]:
    run_dir, said = RunDir(tmp_path), []

    def emit(kind: str, **fields: Any) -> None:
        said.append(fields["message"])

    engine: Any = OneRank()
    return run_dir, Requests(run_dir, engine, emit), said


def test_request_files_are_seen_once_and_answered_beside_themselves(tmp_path: Path) -> None:
    run_dir, requests, said = make(tmp_path)
    assert requests.poll() == Requested()
    path = run_dir.request("save")
    run_dir.request("sample")
    assert requests.poll() == Requested(save=True, sample=True)
    assert requests.poll() == Requested(save=True, sample=True)  # not answered yet
    requests.answer(7)
    assert requests.poll() == Requested()
    assert json.loads(path.with_suffix(".done").read_text())["step"] == 7
    assert not path.exists()
    assert said == ["request 'save' done at step 7", "request 'sample' done at step 7"]


def test_a_save_is_asked_for_when_its_time_has_come(tmp_path: Path, monkeypatch: Any) -> None:
    now = [100.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    engine: Any = OneRank()
    requests = Requests(RunDir(tmp_path), engine, lambda kind, **fields: None, save_every_s=60.0)
    seen = []
    for seconds in (50.0, 20.0, 30.0, 45.0, 200.0, 1.0):  # at 50, 70, 100, 145, 345, 346
        now[0] += seconds
        seen.append(requests.poll().save)
        requests.answer(1)
    assert seen == [False, True, False, True, True, False]
    engine.rank = 1  # whose clock does not count
    now[0] += 1000.0
    assert not requests.poll().save


def test_unreadable_requests_become_errors_and_do_not_stop_the_run(tmp_path: Path) -> None:
    run_dir, requests, _ = make(tmp_path)
    run_dir.control.mkdir()
    (run_dir.control / "00.json").write_text("{")
    (run_dir.control / "01.json").write_text('{"request": "explode"}')
    assert requests.poll() == Requested()
    assert "unreadable" in (run_dir.control / "00.err").read_text()
    assert "explode" in (run_dir.control / "01.err").read_text()
    assert not list(run_dir.control.glob("*.json"))


def test_what_the_run_cannot_do_is_refused_and_not_called_done(tmp_path: Path) -> None:
    run_dir, _, said = make(tmp_path)
    engine: Any = OneRank()
    requests = Requests(
        run_dir, engine, lambda kind, message: said.append(message), {"sample": "no prompts"}
    )
    asked, save = run_dir.request("sample"), run_dir.request("save")
    assert requests.poll() == Requested(save=True)
    requests.answer(3)
    assert json.loads(asked.with_suffix(".err").read_text()) == {"error": "no prompts"}
    assert not asked.with_suffix(".done").exists()
    assert save.with_suffix(".done").exists()
    assert said[0] == "request 'sample' refused: no prompts"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_asks_for_a_stop_and_the_second_ends_at_once(
    tmp_path: Path, number: signal.Signals
) -> None:
    _, requests, _ = make(tmp_path)
    before = signal.getsignal(number)
    with requests:
        os.kill(os.getpid(), number)
        assert requests.poll() == Requested(stop=True)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before
