"""What Tab offers: by the protocol of each shell, and in the real bash."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from app_runs import ENVIRONMENT
from test_tui import finished_run

from app.cli import completion
from app.cli.main import app as root
from app.domain.config_document import ConfigDocument
from app.domain.config_options import options_of
from app.domain.goals import GOALS
from app.queue.jobs import JobSpec
from app.queue.store import QueueStore
from trainer.contract import jobs as contract_jobs
from trainer.contract.catalog import SOLVERS
from trainer.contract.config_io import load_config
from trainer.contract.denoising_options import CFGSkipMode, SLGMode
from trainer.contract.errors import ConfigError
from trainer.contract.loraid import Allocation, Granularity
from trainer.contract.variants import VARIANTS, Expert

APP = [sys.executable, "-m", "app"]
HEAVY = {"torch", "numpy", "textual", "trainer.contract.config", "trainer.contract.catalog"}


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    """Return a folder with runs, configs and a queue."""
    for name in ("fish", "frog", "bird"):
        finished_run(tmp_path / "runs", name, steps=1)
    (tmp_path / "configs").mkdir()
    for name in ("fish.toml", "bird.toml", "notes.txt"):
        (tmp_path / "configs" / name).touch()
    (tmp_path / "top.toml").touch()
    store = QueueStore(tmp_path / "state/menma/queue")
    for name in ("a", "b"):
        store.add(JobSpec(argv=("cache", f"{name}.toml"), name=name, cwd=tmp_path))
    store.close()
    (tmp_path / "xdg/menma/presets").mkdir(parents=True)
    (tmp_path / "xdg/menma/presets/my-own.toml").touch()
    return tmp_path


def ask(folder: Path, shell: str, line: str, allowed: Collection[str] = ()) -> str:
    """Complete the end of a line in a process of its own, which loads nothing heavy for it."""
    words = line.split(" ")
    variables = {
        "_MENMA_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
        "_TYPER_COMPLETE_ARGS": line,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
        "XDG_STATE_HOME": str(folder / "state"),
        "XDG_CONFIG_HOME": str(folder / "xdg"),
        "PYTHONPROFILEIMPORTTIME": "1",
    }
    done = subprocess.run(
        APP, cwd=folder, env=ENVIRONMENT | variables, capture_output=True, text=True, check=False
    )
    names = {part.rpartition("|")[2].strip() for part in done.stderr.splitlines()}
    assert "app.cli.main" in names
    assert names & HEAVY <= set(allowed)
    return done.stdout


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("menma que", ["queue"]),
        ("menma runs show f", ["fish", "frog"]),
        ("menma queue show ", ["1", "2"]),
        ("menma train configs/f", ["configs/fish.toml"]),
        ("menma train x.toml --set training.see", ["training.seed=", "training.seed=42"]),
        ("menma presets show my", ["my-own"]),
    ],
)
def test_each_kind_of_argument_is_offered_by_the_command(scene, line, words):
    assert sorted(ask(scene, "bash", line).splitlines()) == words


TABLES = "trainer.contract.catalog"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("menma sample x --solver ", ["dpm++", "euler", "heun", "lcm", "unipc"]),
        ("menma sample x --schedule full", ["full_range", "full_range_cut"]),
        ("menma sample x --format p", ["png", "prores"]),
        ("menma sample x --step-cache ", ["magcache", "none", "teacache"]),
        ("menma sample x --cfg-skip ea", ["early", "early_late"]),
        ("menma sample x --slg-mode ", ["none", "original", "uncond"]),
        ("menma train x.toml --set sampling.solver=l", ["sampling.solver=lcm"]),
        ("menma presets list --variant wan2.2-t", ["wan2.2-t2v-a14b", "wan2.2-ti2v-5b"]),
        ("menma loraid plan --granularity ", ["block", "linear", "module", "pair"]),
        ("menma lora convert a b --layout k", ["kohya"]),
        ("menma new --goal m", ["motion"]),
    ],
)
def test_values_of_options_are_offered(scene, line, words):
    assert sorted(ask(scene, "bash", line, allowed={TABLES}).splitlines()) == words


def test_names_come_with_what_they_are(scene):
    said = ask(scene, "fish", "menma sample x --format gi", allowed={TABLES})
    assert said.strip() == "gif\ta palette for each frame"


def test_words_are_those_that_are_taken():
    def offered(offer: Callable[[str], completion.Offers]) -> set[str]:
        return {word for word, _ in offer("")}

    def taken(literal: Any) -> set[str]:
        return {str(value) for value in get_args(literal) if value is not None}

    assert offered(completion.layouts) == taken(contract_jobs.LoRALayout)
    assert offered(completion.dtypes) == taken(contract_jobs.OutputDtype)
    assert offered(completion.experts) == taken(Expert)
    assert offered(completion.cfg_skip_modes) == taken(CFGSkipMode)
    assert offered(completion.slg_modes) == taken(SLGMode)
    assert offered(completion.granularities) == taken(Granularity)
    assert offered(completion.allocations) == taken(Allocation)
    assert offered(completion.solvers) == set(SOLVERS.names)
    assert offered(completion.variants) == set(VARIANTS)
    assert offered(completion.goals) == set(GOALS)
    devices = contract_jobs.LoRAExtractRequest.model_fields["device"].annotation
    assert offered(completion.devices) == taken(devices)


def test_zsh_and_fish_get_their_own_forms(scene):
    assert '"fish":"run"' in ask(scene, "zsh", "menma runs show fi")
    assert ask(scene, "fish", "menma runs show fi").strip() == "fish\trun"


def by_hand(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_STATE_HOME", str(folder / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder / "xdg"))


def test_files_are_offered_as_far_as_they_are_typed(scene, monkeypatch):
    by_hand(scene, monkeypatch)

    def files(start: str) -> set[str]:
        return {word for word, _ in completion.configs(start)}

    assert files("") >= {"configs/", "top.toml", "configs/fish.toml", "configs/bird.toml"}
    assert files("co") == {"configs/", "configs/fish.toml", "configs/bird.toml"}
    assert files("configs/b") == {"configs/bird.toml"}
    assert files(f"{scene}/to") == {f"{scene}/top.toml"}
    assert files("nowhere/x") == set()


def test_runs_of_another_folder_and_configs_beside_runs(scene, monkeypatch):
    by_hand(scene, monkeypatch)
    finished_run(scene / "other", "cat", steps=1)
    context = typer.main.get_command(root).make_context("menma", [], resilient_parsing=True)
    context.params["runs_dir"] = str(scene / "other")
    assert completion.runs(context, "") == [("cat", "run")]
    context.params.clear()
    words = {word for word, _ in completion.configs_or_runs(context, "")}
    assert {"fish", "top.toml"} <= words
    assert {"my-own", "top.toml"} <= {word for word, _ in completion.presets_or_configs("")}


def test_what_is_broken_offers_nothing(scene, monkeypatch):
    by_hand(scene, monkeypatch)
    (scene / "state/menma/queue/queue.db").write_bytes(b"nonsense" * 999)
    assert completion.jobs("") == []
    monkeypatch.setenv("XDG_STATE_HOME", str(scene / "nothing"))
    assert completion.jobs("") == []
    assert not (scene / "nothing").exists(), "no queue is made by looking for one"


def test_every_option_that_is_offered_is_one_and_none_is_missing():
    offers = {key for key, _ in completion.option_keys("")}
    shown = {option.key for option in options_of(ConfigDocument(""))}
    missing = {key for key in shown - offers if not key.startswith("dataset.general.")}
    assert missing == {"adapter.frozen", "adapter.loraid"}, "lists of tables, and tables"
    for kind in ("tlora", "dora"):
        text = ConfigDocument(f'[adapter]\nkind = "{kind}"\n')
        assert {option.key for option in options_of(text)} - shown - offers == set()


def wrong_keys(config: Path, setting: str) -> set[str]:
    try:
        load_config(config, [setting])
    except ConfigError as error:
        return {problem.key for problem in error.problems}
    return set()


def test_values_are_those_that_the_option_takes(config):
    def words(typed: str) -> list[str]:
        return [word for word, _ in completion.settings(typed)]

    kinds = words("lr_schedule.kind=")
    assert {"lr_schedule.kind=constant", "lr_schedule.kind=cosine"} <= set(kinds)
    for setting in (*kinds[1:], *words("training.seed=")[1:], *words("memory.blocks_to_swap=")[1:]):
        key = setting.partition("=")[0]
        assert key not in wrong_keys(config, setting), "a kind may need further options"
    assert wrong_keys(config, "lr_schedule.kind=cosin") == {"lr_schedule.kind"}
    cosines = words("lr_schedule.kind=cos")
    assert "lr_schedule.kind=cosine" in cosines
    assert all(word.startswith("lr_schedule.kind=cos") for word in cosines)
    assert words("nothing.at.all") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_installed(tmp_path, shell):
    environment = ENVIRONMENT | {
        "HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1",
    }  # fmt: skip
    command = [*APP, "--install-completion", shell]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert any("_MENMA_COMPLETE" in text for text in written)


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_in_the_real_bash(scene):
    """Install it as users do, then ask bash itself what it would put in."""
    tools = scene / "bin"
    tools.mkdir()
    (tools / "menma").write_text(f'#!/bin/sh\nexec {sys.executable} -m app "$@"\n')
    (tools / "menma").chmod(0o755)
    environment = ENVIRONMENT | {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "XDG_STATE_HOME": str(scene / "state"),
    }  # fmt: skip
    script = """
    eval "$(menma --show-completion bash)"
    COMP_WORDS=(menma runs show f); COMP_CWORD=3; COMP_LINE="menma runs show f"; COMP_POINT=17
    _menma_completion menma; printf '%s\\n' "${COMPREPLY[@]}"
    """
    done = subprocess.run(
        ["bash", "--norc", "-c", script], cwd=scene, env=environment, capture_output=True, text=True
    )
    assert sorted(done.stdout.split()) == ["fish", "frog"], done.stderr
