"""What is written into a run directory before its trainer starts."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from app.runs.child import child_environment, run_job
from app.runs.launch import Preparation, console_tail, masked_environment, move_aside, prepare
from trainer.contract.errors import BusyError
from trainer.contract.jobs import TrainRequest
from trainer.contract.run_dir import RunDir


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path / "runs" / "fish")


def prepared(run, argv=("menma", "train"), environ=None):
    preparation = Preparation(
        config_text="name = 'fish'\n", overrides=("training.seed=7",), resume="auto", argv=argv
    )
    return prepare(run, preparation, environ)


def test_the_request_is_what_the_trainer_reads(run):
    request = TrainRequest.model_validate(json.loads(prepared(run).read_text()))
    assert request.config == run.config
    assert request.set == ("training.seed=7",)
    assert run.config.read_text() == "name = 'fish'\n"


def test_secrets_are_masked_and_settings_are_not(run):
    secrets = {
        "HF_TOKEN": "hush-1",
        "AWS_SECRET_ACCESS_KEY": "hush-2",
        "wandb_api_key": "hush-3",
        "DB_PASSWORD": "hush-4",
        "HTTPS_PROXY": "http://me:hush-5@proxy:80/",
        "PGPASSWORD": "hush-6",
    }
    plain = {"CUDA_VISIBLE_DEVICES": "0,1", "TOKENIZERS_PARALLELISM": "false", "KEEP": "it"}
    argv = ("menma", "train", "--set", "logging.api_key=hush-7", "https://me:hush-8@host/x")
    prepared(run, argv, {**secrets, **plain})
    text = run.command.read_text()
    assert "hush" not in text
    command = json.loads(text)
    assert command["env"] == {
        **dict.fromkeys(secrets, "***"), "HTTPS_PROXY": "http://***@proxy:80/", **plain
    }  # fmt: skip
    assert command["argv"][:3] == ["menma", "train", "--set"]
    assert command["argv"][3] == "logging.api_key=***"


def test_masking_takes_nothing_from_the_environment_itself():
    environ = {"HF_TOKEN": "hush"}
    masked_environment(environ)
    assert environ == {"HF_TOKEN": "hush"}


def test_an_earlier_run_is_kept_under_the_next_free_name(run):
    for content in ("first", "second"):
        prepared(run)
        run.config.write_text(content)
        move_aside(run)
    assert not run.root.exists()
    kept = [run.root.with_name(f"fish.{number}") / "config.toml" for number in (1, 2)]
    assert [path.read_text() for path in kept] == ["first", "second"]


def test_a_living_run_is_not_moved(runs):
    run = runs.start("steps")
    with pytest.raises(BusyError):
        move_aside(run)
    assert run.root.exists()


def test_the_console_tail_leaves_events_out(run):
    run.root.mkdir(parents=True)
    run.console.write_text('one\n{"v": 1, "type": "step"}\ntwo\nthree\n')
    assert console_tail(run, 2) == ["two", "three"]
    assert console_tail(run, 9, offset=4) == ["two", "three"]
    assert console_tail(RunDir(run.root / "none")) == []


def test_a_folder_named_trainer_is_not_taken_for_ours(tmp_path, monkeypatch):
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "__main__.py").write_text("print('not ours')")
    monkeypatch.chdir(tmp_path)
    words = []
    code = run_job("none-such", {}, words.append, words.append, words.append)
    assert code == 2
    assert any("jobs: check, cache, train" in word for word in words)


def test_the_child_finds_our_source_first(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/theirs")
    first, second = child_environment()["PYTHONPATH"].split(os.pathsep)
    assert Path(first).samefile(Path(__file__).parents[2])
    assert second == "/theirs"
