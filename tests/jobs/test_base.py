"""Jobs: requests are checked, and failures become words and exit codes."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.contract.errors import BusyError, ConfigError, DataError, NonFiniteError
from trainer.contract.jobs import JOBS, REQUESTS
from trainer.jobs.base import Stopped, main, read_request, run_guarded

ROOT = Path(__file__).parents[2]


def outcome(error: BaseException) -> tuple[int, list[dict[str, Any]]]:
    said: list[dict[str, Any]] = []

    def job() -> None:
        raise error

    def emit(kind: str, /, **fields: Any) -> None:
        said.append({"type": kind, **fields})

    return run_guarded(job, emit), said


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x", hint="y"), 2),
        (DataError("x", hint="y"), 2),
        (NonFiniteError("x", hint="y"), 1),
        (BusyError("x", hint="y"), 3),
    ],
)
def test_errors_for_people_have_a_code_and_no_traceback(
    error: Any, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    found, said = outcome(error)
    assert found == code
    assert said == [{"type": "error", "message": "x", "hint": "y", "code": code}]
    assert capsys.readouterr().err == "error: x\n  y\n"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        MemoryError("no"),
    ],
)
def test_out_of_memory_names_settings_that_exist(error: BaseException) -> None:
    from trainer.contract.config import RunConfig

    code, (said,) = outcome(error)
    assert code == 1
    assert "memory" in said["message"]
    for key in ("memory.gradient_checkpointing", "training.gradient_accumulation_steps"):
        assert key in said["hint"]
        section, field = key.split(".")
        assert field in type(getattr(RunConfig(), section)).model_fields


def test_a_full_disk_is_exit_code_1() -> None:
    code, (said,) = outcome(OSError(errno.ENOSPC, "No space left on device", "/x/y"))
    assert code == 1
    assert "/x/y" in said["message"]


def test_bugs_keep_their_traceback() -> None:
    with pytest.raises(ValueError, match="a bug"):
        outcome(ValueError("a bug"))
    with pytest.raises(RuntimeError, match="shape"):
        outcome(RuntimeError("shape mismatch"))
    with pytest.raises(FileNotFoundError):
        outcome(FileNotFoundError(errno.ENOENT, "No such file", "/x"))


@pytest.mark.parametrize("error", [Stopped(), KeyboardInterrupt()])
def test_interrupted_is_130(error: BaseException) -> None:
    assert outcome(error)[0] == 130


@pytest.mark.skipif(os.name == "nt", reason="no signals there")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_work_begins_is_130_too(tmp_path: Path, number: int) -> None:
    pipe = tmp_path / "request.json"
    os.mkfifo(pipe)  # reading its request, the job waits for us
    job = subprocess.Popen(
        [sys.executable, "-m", "trainer", "check", str(pipe)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    with pipe.open("w"):  # opens once the job does
        job.send_signal(number)
        _, words = job.communicate(timeout=60)
    assert job.returncode == 130, words
    assert words == "interrupted\n"


def test_requests_are_strict(tmp_path: Path) -> None:
    path = tmp_path / "request.json"
    path.write_text(json.dumps({"config": "c.toml", "resmue": "auto"}))
    with pytest.raises(ConfigError, match=r"resmue: unknown key \(did you mean 'resume'\?\)"):
        read_request("train", str(path))
    path.write_text("{")
    with pytest.raises(ConfigError, match="cannot read the request"):
        read_request("train", str(path))


def test_every_job_has_a_request_and_a_function() -> None:
    assert set(JOBS.names) == set(REQUESTS)
    for name in JOBS.names:
        assert callable(JOBS.load(name))


def test_an_unknown_job_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "train" in capsys.readouterr().err
