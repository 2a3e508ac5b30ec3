"""A queue whose database is lost, broken, or on a volume that is no local disk."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path

import pytest
from test_queue_worker import Queue, queue  # noqa: F401  (a fixture)

from app.queue import store as store_module
from app.queue.jobs import JobSpec, JobState
from app.queue.look import look_at
from app.queue.rebuild import rebuild
from app.queue.store import FILE, QueueStore, _choose_journal
from app.queue.volumes import network_volume
from app.queue.worker import Worker, worker_lock
from app.runs import control
from app.runs.lock import RunLock


def lose_database(folder: Path) -> None:
    for file in folder.glob(f"{FILE}*"):
        file.unlink()


def states(store: QueueStore) -> dict[int, JobState]:
    return {job.id: look_at(job).state for job in store.jobs()}


def test_what_was_started_comes_back_as_it_is_and_goes_on(queue: Queue):  # noqa: F811
    done = queue.add("cache", "done")
    failed = queue.add("cache", "bad", "fail", priority=3)
    queue.work()
    train = queue.add("train", "fish", "steps")
    queue.turn_until(train, JobState.RUNNING)
    queue.add("cache", "waits")
    before = {job.id: job for job in queue.store.jobs()}
    folder = queue.store.folder
    queue.store.close()
    lose_database(folder)

    found = rebuild(folder, [])
    assert (sorted(found.jobs), found.unreadable, found.kept) == ([done, failed, train], (), None)
    queue.store = QueueStore(folder)
    assert states(queue.store) == {
        done: JobState.DONE, failed: JobState.FAILED, train: JobState.RUNNING,
    }  # fmt: skip
    for job in queue.store.jobs():
        old = before[job.id]
        assert job.spec == old.spec
        assert job.claim.token == old.claim.token
        assert job.claim.devices == old.claim.devices
    assert rebuild(folder, [queue.cwd / "runs"]).jobs == (), "nothing comes back twice"

    queue.worker = Worker(queue.store, list)
    control.stop(_run(queue, train), control.Urgency.SAVE)
    queue.turn_until(train, JobState.STOPPED)
    queue.work()
    assert queue.ran() == ["bad", "done"] or queue.ran() == ["done", "bad"], "none ran again"


def _run(queue: Queue, number: int):  # noqa: F811
    from app.queue.look import job_run

    return job_run(queue.store.job(number).claim)


def test_a_training_comes_back_from_its_run_when_all_of_the_queue_is_gone(queue: Queue):  # noqa: F811
    train = queue.add("train", "fish", "finish")
    queue.work()
    folder = queue.store.folder
    queue.store.close()
    shutil.rmtree(folder)
    found = rebuild(folder, [queue.cwd / "runs"])
    queue.store = QueueStore(folder)
    (job,) = queue.store.jobs()
    assert found.jobs == (job.id,) == (train,)
    assert look_at(job).state is JobState.DONE
    assert job.spec.argv[0] == "train"


def test_a_job_that_was_claimed_and_never_started_is_held(tmp_path):
    place = tmp_path / "jobs/7-abc"
    place.mkdir(parents=True)
    (place / "command.json").write_text(
        json.dumps({"argv": ["menma", "cache", "a.toml"], "cwd": "/tmp", "time": 1.0, "job": 7})
    )
    (tmp_path / "jobs/8-def").mkdir()
    (tmp_path / "jobs/9-ghi").mkdir()
    (tmp_path / "jobs/9-ghi/command.json").write_text('{"argv": ["menma", "rm"], "cwd": 3}')
    found = rebuild(tmp_path, [tmp_path / "nothing"])
    (job,) = QueueStore(tmp_path).jobs()
    assert (job.id, job.spec.held, job.claim) == (7, True, None)
    assert found.unreadable == (tmp_path / "jobs/8-def", tmp_path / "jobs/9-ghi")
    assert QueueStore(tmp_path).ready() == []


def test_the_command_keeps_a_database_that_is_broken(menma, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    folder = tmp_path / "state/menma/queue"
    folder.mkdir(parents=True)
    (folder / FILE).write_bytes(b"nonsense" * 1000)
    code, _, err = menma("queue", "list")
    assert (code, "cannot be used" in err, "menma queue rebuild" in err) == (1, True, True)
    code, _, err = menma("queue", "rebuild")
    assert (code, "0 jobs are in the list again" in err) == (0, True)
    (kept,) = folder.glob(f"{FILE}.broken-*")
    assert kept.read_bytes().startswith(b"nonsense")
    assert menma("queue", "list").code == 0
    lock = RunLock.acquire(worker_lock(folder))
    code, _, err = menma("queue", "rebuild")
    lock.release()
    assert (code, "a worker is at work" in err) == (3, True)


def test_volumes_of_a_network_are_known(tmp_path):
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "/dev/sda / ext4 rw 0 0\nserver:/x /home nfs4 rw 0 0\n"
        "/dev/sdb /home/local ext4 rw 0 0\nu@h: /mnt/far\\040away fuse.sshfs rw 0 0\n"
    )
    kinds = {
        "/var/lib": "", "/home/me/.local/state": "nfs4", "/home/local/me": "", "/homely": "",
        "/mnt/far away/x": "fuse.sshfs", "/mnt/far": "",
    }  # fmt: skip
    assert {place: network_volume(Path(place), mounts) for place in kinds} == kinds
    assert network_volume(Path("/home"), tmp_path / "none") == ""
    assert network_volume(tmp_path) == ""


def journal(folder: Path) -> str:
    return sqlite3.connect(folder / FILE).execute("PRAGMA journal_mode").fetchone()[0]


def test_on_a_network_volume_the_journal_is_a_file_and_it_is_said(menma, tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "network_volume", lambda folder: "nfs4")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    store = QueueStore(store_module.queue_folder())
    store.add(JobSpec(argv=("cache", "a.toml"), name="a", cwd=tmp_path, held=True))
    assert journal(store.folder) == "delete"
    code, out, err = menma("queue", "list")
    assert (code, "held" in out) == (0, True)
    assert "on a network volume (nfs4)" in " ".join(err.split())
    store.close()


def test_a_local_queue_has_the_write_ahead_log_and_no_words(tmp_path):
    store = QueueStore(tmp_path)
    assert (store.note, journal(tmp_path)) == ("", "wal")


def test_where_readers_share_no_memory_the_journal_is_a_file(tmp_path):
    """SQLite's own way to work without shared memory: locks as files."""
    uri = f"{(tmp_path / 'x.db').as_uri()}?vfs=unix-dotfile"
    try:
        connection = sqlite3.connect(uri, uri=True, isolation_level=None)
    except sqlite3.OperationalError:
        pytest.skip("this SQLite has no such file layer")
    words = _choose_journal(connection, "", tmp_path / "x.db")
    assert "without shared memory" in words
    assert connection.execute("PRAGMA journal_mode").fetchone()[0] == "delete"
    connection.execute("CREATE TABLE t (x)")
    connection.close()
