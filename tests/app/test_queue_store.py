"""The database of jobs: order, dependencies, and that a job is handed out once."""

from __future__ import annotations

import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from app_runs import ENVIRONMENT

from app.queue.jobs import Claim, JobSpec, JobState, Outcome, kind_of
from app.queue.look import look_at_all
from app.queue.store import QueueStore, queue_folder
from trainer.contract.errors import DiskError, UserError


@pytest.fixture
def store(tmp_path: Path) -> QueueStore:
    return QueueStore(tmp_path / "queue")


def spec(name: str = "a", **options) -> JobSpec:
    return JobSpec(argv=("cache", f"{name}.toml"), name=name, cwd=Path("/somewhere"), **options)


def claim(store: QueueStore, number: int, token: str = "t") -> bool:
    return store.claim(number, Claim(token, store.folder / "jobs" / token, time.time(), ("0",)))


def end(store: QueueStore, number: int, state: JobState = JobState.DONE) -> None:
    assert claim(store, number, f"t{number}")
    assert store.record(number, f"t{number}", Outcome(state, "why", 1.0))


def names(jobs) -> list[str]:
    return [job.spec.name for job in jobs]


def test_what_is_added_comes_back(store):
    wanted = spec("fish", environment={"A": "1"}, priority=3, gpus=("0", "2"), held=True, after=())
    number = store.add(wanted)
    job = QueueStore(store.folder).job(number)
    assert job.spec == wanted
    assert job.waits
    assert job.to_json()["command"] == ["menma", "cache", "fish.toml"]


def test_priority_then_the_order_of_coming(store):
    for name, priority in (("a", 0), ("b", 5), ("c", 0), ("d", 5)):
        store.add(spec(name, priority=priority))
    assert names(store.jobs()) == names(store.ready()) == ["b", "d", "a", "c"]


def test_moving(store):
    numbers = {name: store.add(spec(name)) for name in "abcd"}
    store.move(numbers["d"], before=numbers["b"])
    assert names(store.jobs()) == ["a", "d", "b", "c"]
    store.move(numbers["c"], before=numbers["a"])
    assert names(store.jobs()) == ["c", "a", "d", "b"]
    store.move(numbers["c"], before=None)
    assert names(store.jobs()) == ["a", "d", "b", "c"]
    for _ in range(60):  # halves of halves
        store.move(numbers["c"], before=numbers["b"])
        store.move(numbers["d"], before=numbers["c"])
    assert names(store.jobs()) == ["a", "d", "c", "b"]
    store.set_priority(numbers["b"], 1)
    assert names(store.jobs())[0] == "b"
    store.move(numbers["a"], before=numbers["b"])
    assert names(store.jobs())[:2] == ["a", "b"], "it takes the other one's priority"


def test_a_chain_runs_in_order_and_only_after_good_ends(store):
    first, second, third = store.add_all([spec(n) for n in "abc"], chained=True)
    assert names(store.ready()) == ["a"]
    end(store, first)
    assert names(store.ready()) == ["b"]
    end(store, second, JobState.FAILED)
    assert names(store.ready()) == []
    states = {view.job.id: view for view in look_at_all(store.jobs())}
    assert states[third].state is JobState.BLOCKED
    assert states[third].why == f"job {second} did not end well"
    again = store.add(store.job(second).spec)
    store.replace(second, again)
    assert names(store.ready()) == ["b"]
    end(store, again)
    assert names(store.ready()) == ["c"]


def test_what_blocks_is_seen_through_those_that_wait(store):
    a, b, c = store.add_all([spec(n) for n in "abc"], chained=True)
    store.cancel(a)
    states = [view.state for view in look_at_all(store.jobs())]
    assert states == [JobState.CANCELLED, JobState.BLOCKED, JobState.BLOCKED]
    assert [job.id for job in store.jobs()] == [a, b, c]
    assert names(store.ready()) == []


def test_held_and_paused(store):
    number = store.add(spec(held=True))
    assert not store.ready()
    assert not claim(store, number)
    assert look_at_all(store.jobs())[0].state is JobState.HELD
    store.hold(number, held=False)
    assert names(store.ready()) == ["a"]
    assert not store.paused
    store.paused = True
    assert QueueStore(store.folder).paused
    store.paused = False
    assert not store.paused


def test_a_job_is_claimed_once_and_its_first_end_counts(store):
    number = store.add(spec())
    assert claim(store, number, "one")
    assert not claim(store, number, "two")
    assert not store.release(number, "two")
    assert not store.record(number, "two", Outcome(JobState.DONE))
    assert store.record(number, "one", Outcome(JobState.FAILED, "why", 2.0))
    assert not store.record(number, "one", Outcome(JobState.DONE))
    assert not store.release(number, "one")
    assert store.job(number).outcome == Outcome(JobState.FAILED, "why", 2.0)
    assert not store.claimed()


def test_what_was_never_started_is_given_back(store):
    number = store.add(spec())
    claim(store, number)
    assert [job.id for job in store.claimed()] == [number]
    assert store.release(number, "t")
    assert names(store.ready()) == ["a"]


def test_cancelled_jobs_are_not_handed_out(store):
    number = store.add(spec())
    store.cancel(number)
    assert not store.ready()
    assert not claim(store, number)


def test_wrong_numbers_and_commands_are_named(store):
    with pytest.raises(UserError, match="no such job: 9"):
        store.job(9)
    with pytest.raises(UserError, match="no such job: 9"):
        store.add(spec(after=(9,)))
    assert store.jobs() == [], "nothing of it was queued"
    with pytest.raises(UserError, match="'trian' cannot be queued") as error:
        kind_of(("trian", "x.toml"))
    assert "train" in error.value.hint
    with pytest.raises(UserError, match="no command"):
        kind_of(())


def test_a_newer_or_damaged_database_is_left_alone(tmp_path):
    store = QueueStore(tmp_path)
    store.close()
    with sqlite3.connect(tmp_path / "queue.db") as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(DiskError, match="newer Menma"):
        QueueStore(tmp_path)
    (tmp_path / "queue.db").write_bytes(b"not a database at all" * 100)
    for leftover in ("queue.db-wal", "queue.db-shm"):
        (tmp_path / leftover).unlink(missing_ok=True)
    with pytest.raises(DiskError, match="cannot be used"):
        QueueStore(tmp_path)


def test_the_folder_follows_the_state_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert queue_folder() == tmp_path / "menma/queue"
    monkeypatch.delenv("XDG_STATE_HOME")
    assert queue_folder() == Path.home() / ".local/state/menma/queue"


CLAIMER = """
import os, sys, time, uuid
from pathlib import Path
from app.queue.jobs import Claim, JobState, Outcome
from app.queue.store import QueueStore

folder = Path(sys.argv[1])
store = QueueStore(folder)
log = os.open(folder / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
while ready := store.ready(8):
    for job in ready:
        token = uuid.uuid4().hex
        if store.claim(job.id, Claim(token, folder / token, time.time(), ())):
            os.write(log, f"{job.id} {token}\\n".encode())
            store.record(job.id, token, Outcome(JobState.DONE, "", time.time()))
"""


@pytest.mark.slow
def test_eight_processes_that_are_killed_take_each_of_2000_jobs_once(tmp_path):
    folder = tmp_path / "queue"
    store = QueueStore(folder)
    store.add_all([spec(str(number)) for number in range(2000)])
    chance = random.Random(5)

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", CLAIMER, str(folder)], env=ENVIRONMENT)

    def logged() -> dict[int, list[str]]:
        found: dict[int, list[str]] = {}
        for line in (folder / "log").read_text().splitlines() if (folder / "log").exists() else []:
            number, token = line.split()
            found.setdefault(int(number), []).append(token)
        return found

    def give_back() -> int:
        """What a worker does: a claimed job that left no trace of a start is ready again."""
        seen = logged()
        lost = [job for job in store.claimed() if job.claim.token not in seen.get(job.id, [])]
        return sum(store.release(job.id, job.claim.token) for job in lost)

    workers = [start() for _ in range(8)]
    kills = 0
    while any(worker.poll() is None for worker in workers) and kills < 24:
        time.sleep(chance.uniform(0.01, 0.25))
        index = chance.randrange(8)
        if workers[index].poll() is None:
            workers[index].send_signal(signal.SIGKILL)
            workers[index].wait()
            kills += 1
        workers[index] = start()
    for worker in workers:
        assert worker.wait(timeout=120) in {0, -signal.SIGKILL}
    assert kills > 5
    while give_back():
        assert start().wait(timeout=120) == 0
    times = Counter(len(tokens) for tokens in logged().values())
    assert times == {1: 2000}, "each job was started exactly once"
    jobs = store.jobs()
    # One that was killed between the start and the record has left its claim, which is its proof.
    assert all(job.outcome or job.claim.token in logged()[job.id] for job in jobs)
