"""An error on one rank is the error of all: `python -m tests.engine.test_failures FOLDER`."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.warm import start as warm
from trainer.contract.errors import DataError, DiskError, OutOfMemoryError, RunError
from trainer.engine.failures import _without_a_word, failing_together
from trainer.engine.launch import RENDEZVOUS_VARIABLE, run_workers
from trainer.engine.process_group import World, joined
from trainer.jobs.base import explain

ROOT = Path(__file__).parents[2]


class Full(OSError):
    """A full disk, found by a library that knows nothing of our errors."""

    def __init__(self) -> None:
        super().__init__(28, "No space left on device", "/data/x")


CASES: dict[str, BaseException] = {
    "data": DataError("clip.mp4 is damaged", hint="cache it again"),
    "disk": Full(),
    "memory": torch.OutOfMemoryError("CUDA out of memory"),
    "interrupt": KeyboardInterrupt(),
    "bug": ZeroDivisionError("division by zero"),
}


def throw(error: BaseException) -> None:
    raise error


def fail_on_rank_1(error: BaseException) -> dict[str, str]:
    """Let rank 1 fail in the middle of a step; return what this rank ended with."""
    try:
        with joined("cpu", 30) as world, failing_together(world, explain):
            world.barrier()
            if world.rank == 1:
                throw(error)
            world.barrier()
    except BaseException as caught:  # noqa: BLE001 - what it is, is what is tested
        hint = getattr(caught, "hint", "")
        return {"kind": type(caught).__name__, "words": str(caught), "hint": hint}
    return {}


def worker(folder: Path) -> None:
    """Run every case in this process; the last one kills rank 1."""
    rank, seen = int(os.environ["RANK"]), {}
    for name, error in CASES.items():
        os.environ[RENDEZVOUS_VARIABLE] = f"file://{folder / name}"
        seen[name] = fail_on_rank_1(error)
    (folder / f"rank{rank}.json").write_text(json.dumps(seen))
    os.environ[RENDEZVOUS_VARIABLE] = f"file://{folder / 'killed'}"
    try:
        with joined("cpu", 30) as world, failing_together(world, explain):
            world.barrier()
            if world.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            world.barrier()
    except RunError as error:
        (folder / "killed.json").write_text(json.dumps(str(error)))
    os._exit(0)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("failures")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.engine.test_failures", str(folder)]
    done = warm.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 128 + signal.SIGKILL, done.stderr[-3000:]
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
    return {"ranks": ranks, "killed": json.loads((folder / "killed.json").read_text())}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "kind", "word"),
    [
        ("data", "DataError", "clip.mp4 is damaged"),
        ("disk", "DiskError", "/data/x"),
        ("memory", "OutOfMemoryError", "CUDA out of memory"),
        ("interrupt", "KeyboardInterrupt", ""),
    ],
)
def test_both_ranks_end_with_the_error_of_one(seen, case, kind, word):
    for rank in seen["ranks"]:
        assert rank[case]["kind"] == kind
        assert word in rank[case]["words"]
    assert seen["ranks"][0][case]["hint"] == seen["ranks"][1][case]["hint"]


@pytest.mark.slow
def test_a_bug_keeps_its_kind_where_it_happened(seen):
    here, there = seen["ranks"][1]["bug"], seen["ranks"][0]["bug"]
    assert here == {"kind": "ZeroDivisionError", "words": "division by zero", "hint": ""}
    assert there["kind"] == "RunError"
    assert "rank 1 failed: ZeroDivisionError: division by zero" in there["words"]


@pytest.mark.slow
def test_a_killed_process_is_named_as_what_it_is(seen):
    assert "broke off" in seen["killed"]
    assert "killed" in seen["killed"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "[/a/gloo/tcp/pair.cc:537] Read error [127.0.0.1]:9: Connection reset by peer. This is "
            "typically caused by a remote worker hanging. GLHF!",
            "broke off: Read error [127.0.0.1]:9: Connection reset by peer",
        ),
        (
            "[/a/gloo/tcp/unbound_buffer.cc:78] Timed out waiting 10000ms for recv",
            "does not answer: Timed out waiting 10000ms for recv",
        ),
    ],
)
def test_lost_connections_are_told_without_the_librarys_noise(words, message):
    error = _without_a_word(RuntimeError(words))
    assert error.message.endswith(message)
    assert ("distributed.timeout_s" in error.hint) == ("Timed out" in words)


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (DataError("x", hint="y"), DataError),
        (Full(), DiskError),
        (torch.OutOfMemoryError("CUDA out of memory"), OutOfMemoryError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (ZeroDivisionError("x"), ZeroDivisionError),
    ],
)
def test_one_process_is_told_in_words_too(raised, kind):
    with pytest.raises(kind) as caught, failing_together(World.alone(), explain):
        raise raised
    assert type(caught.value) is kind


if __name__ == "__main__":
    if "RANK" in os.environ:
        worker(Path(sys.argv[1]))
    sys.exit(run_workers([sys.executable, "-m", "tests.engine.test_failures", sys.argv[1]], 2))
