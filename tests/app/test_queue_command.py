"""`menma queue`: the commands, and what they say when something is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import CONFIG

from app.cli.commands import queue as commands
from app.queue.jobs import Claim, JobState, Outcome
from app.queue.store import QueueStore, queue_folder
from app.queue.worker import worker_lock
from app.runs.lock import RunLock


@pytest.fixture
def started(monkeypatch, tmp_path) -> list[Path]:
    """Return the folders for which a worker was asked; none is started."""
    found: list[Path] = []
    monkeypatch.setattr(commands, "ensure_worker", found.append)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return found


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "fish.toml"
    path.write_text(CONFIG)
    return path


def end(number: int, state: JobState) -> None:
    store = QueueStore(queue_folder())
    store.claim(number, Claim(f"t{number}", queue_folder() / "jobs/x", 1.0, ()))
    store.record(number, f"t{number}", Outcome(state, "because", 2.0))


def listed(menma) -> list[dict]:
    return json.loads(menma("queue", "list", "--json").out)


def test_adding_and_listing(menma, started, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hush")
    monkeypatch.setenv("HF_HOME", "/models")
    added = menma("queue", "add", "--name", "x", "cache", "fish.toml", "--set", "training.seed=7")
    assert (added.code, added.out) == (0, "1\n")
    assert menma("queue", "add", "--after", "1", "train", "fish.toml", "--gpus", "2").out == "2\n"
    assert menma("queue", "add", "--gpus", "0,3", "sample", "runs/fish").code == 0
    assert menma("queue", "add", "lora", "inspect", "a.safetensors").code == 0
    assert started == [queue_folder()] * 4
    jobs = listed(menma)
    assert jobs[0]["command"] == ["menma", "cache", "fish.toml", "--set", "training.seed=7"]
    assert [job["gpus"] for job in jobs] == [1, 2, ["0", "3"], 0]
    assert [job["name"] for job in jobs] == ["x", "fish", "fish", "inspect"]
    assert jobs[0]["cwd"] == str(Path.cwd())
    environment = QueueStore(queue_folder()).job(1).spec.environment
    assert environment["HF_HOME"] == "/models"
    assert "HF_TOKEN" not in environment, "a secret is not written to the disk"
    table = menma("queue", "list").out
    assert table.splitlines()[0].split() == [
        "ID",
        "KIND",
        "NAME",
        "STATE",
        "STEP",
        "ETA",
        "GPU",
        "WHY",
    ]
    assert "after 1" in table
    assert "menma cache fish.toml" in menma("queue", "show", "1").out


def test_a_queue_without_a_worker_says_so(menma, started):
    menma("queue", "add", "cache", "a.toml")
    assert "No worker is at work" in menma("queue", "list").err
    lock = RunLock.acquire(worker_lock(queue_folder()))
    assert "No worker" not in menma("queue", "list").err
    lock.release()
    menma("queue", "pause")
    assert "No worker" not in menma("queue", "list").err


def test_an_empty_queue_says_what_to_do(menma, started):
    assert "menma queue add" in menma("queue", "list").err
    assert listed(menma) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["add", "trian", "x"], "'trian' cannot be queued"),
        (["add", "--after", "7", "cache", "x"], "no such job: 7"),
        (["add", "--gpus", "many", "cache", "x"], "a number of GPUs"),
        (["show", "7"], "no such job: 7"),
        (["move", "1"], "one of --before, --top"),
        (["logs", "1"], "was not started yet"),
        (["retry", "1"], "job 1 has not ended: queued"),
        (["remove"], "--ended"),
    ],
)
def test_mistakes_are_named(menma, started, arguments, words):
    menma("queue", "add", "cache", "x.toml")
    answer = menma("queue", *arguments)
    assert answer.code == 2
    assert words in answer.err


def test_moving_pausing_and_resuming(menma, started):
    for name in "abc":
        menma("queue", "add", "cache", f"{name}.toml")
    menma("queue", "move", "3", "--top")
    assert [job["name"] for job in listed(menma)] == ["c", "a", "b"]
    menma("queue", "move", "3", "--before", "2")
    menma("queue", "move", "1", "--bottom")
    assert [job["name"] for job in listed(menma)] == ["c", "b", "a"]
    menma("queue", "move", "1", "--priority", "5")
    assert [job["name"] for job in listed(menma)] == ["a", "c", "b"]
    menma("queue", "pause", "2")
    assert listed(menma)[2]["state"] == "held"
    menma("queue", "resume", "2")
    menma("queue", "pause")
    assert "paused" in menma("queue", "list").err
    assert "paused" in menma("queue", "add", "cache", "d.toml").err
    menma("queue", "resume")
    assert "paused" not in menma("queue", "list").err
    end(1, JobState.DONE)
    assert "waits no longer: done" in menma("queue", "pause", "1").err


def test_cancel_retry_duplicate_remove(menma, started):
    menma("queue", "add", "cache", "a.toml")
    menma("queue", "add", "--after", "1", "train", "a.toml")
    end(1, JobState.FAILED)
    assert listed(menma)[0]["state"] == "blocked"
    assert menma("queue", "retry", "1").out == "3\n"
    jobs = {job["id"]: job for job in listed(menma)}
    assert jobs[2]["after"] == [3]
    assert jobs[2]["state"] == "queued"
    menma("queue", "duplicate", "2", "--set", "training.seed=7", "--name", "seven")
    copy = QueueStore(queue_folder()).job(4).spec
    assert copy.argv == ("train", "a.toml", "--set", "training.seed=7")
    assert (copy.name, copy.after) == ("seven", ())
    menma("queue", "cancel", "2", "4")
    assert {job["id"]: job["state"] for job in listed(menma)} == {
        1: "failed", 2: "cancelled", 3: "queued", 4: "cancelled",
    }  # fmt: skip
    assert "3 jobs removed" in menma("queue", "remove", "--ended").err
    assert [job["id"] for job in listed(menma)] == [3]


def test_a_command_line_is_edited(menma, started, monkeypatch, tmp_path):
    menma("queue", "add", "cache", "a.toml")
    editor = tmp_path / "editor"
    editor.write_text('#!/bin/sh\necho "cache \'b c.toml\'" > "$1"\n')
    editor.chmod(0o755)
    monkeypatch.setenv("VISUAL", str(editor))
    assert menma("queue", "duplicate", "1", "--edit").code == 0
    assert QueueStore(queue_folder()).job(2).spec.argv == ("cache", "b c.toml")
    monkeypatch.setenv("VISUAL", "no-such-editor")
    assert "cannot be started" in menma("queue", "duplicate", "1", "--edit").err


def test_a_chain_is_queued_in_one_action(menma, started, config):
    answer = menma(
        "queue", "chain", config, "--steps", "cache,train-high,train-low,sample,merge", "--json"
    )
    jobs = json.loads(answer.out)
    assert [job["kind"] for job in jobs] == ["cache", "train", "train", "sample", "merge", "merge"]
    assert [job["after"] for job in jobs] == [[], [1], [2], [3], [4], [5]]
    high = jobs[1]["command"]
    assert high[-4:] == ["--set", "model.expert=high_noise", "--set", 'name="fish-high_noise"']
    lora = "runs/fish-high_noise/output/fish-high_noise.safetensors"
    assert f"{lora}@high_noise" in jobs[3]["command"]
    assert lora in jobs[4]["command"]
    plain = json.loads(menma("queue", "chain", config, "--steps", "train,sample", "--json").out)
    assert plain[1]["command"] == ["menma", "sample", "runs/fish"]
    assert started == [queue_folder()] * 2


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ("cache,trian", "unknown step 'trian'"),
        ("train,train", "twice"),
        ("train,train-low", "at once"),
        ("cache,merge", "merge needs something"),
    ],
)
def test_wrong_chains_are_named(menma, started, config, steps, words):
    answer = menma("queue", "chain", config, "--steps", steps)
    assert answer.code == 2
    assert words in answer.err
    assert listed(menma) == []
    assert started == []
