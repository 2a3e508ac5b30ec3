"""Where the processes of a run are started, and what this machine has to have for it."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch

from trainer.contract.config import RunConfig, load_config
from trainer.contract.errors import ConfigError
from trainer.jobs import start

HERE = socket.gethostname()
FILE = Path("c.toml")


@pytest.fixture
def config_of(tmp_path: Path):
    def make(hosts: str = "", *settings: str) -> RunConfig:
        (tmp_path / "c.toml").write_text('name = "x"\n')
        if hosts:
            (tmp_path / "hosts").write_text(hosts)
            settings = (*settings, f'distributed.hostfile="{tmp_path}/hosts"')
        return load_config(tmp_path / "c.toml", settings)

    return make


@pytest.fixture
def started(monkeypatch) -> list[tuple[str, object]]:
    """Record what would be started."""
    calls: list[tuple[str, object]] = []
    for name in ("run_workers", "run_cluster"):
        monkeypatch.setattr(
            start, name, lambda command, where, *_, name=name: calls.append((name, where)) or 0
        )
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return calls


def with_gpus(monkeypatch, number: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: number)


def test_one_process_is_this_one(config_of, started):
    assert start.run_elsewhere(config_of("", "distributed.num_processes=1"), FILE) is None
    assert start.run_elsewhere(config_of(f"{HERE} slots=1"), FILE) is None
    assert started == []


def test_several_are_started(config_of, started):
    assert start.run_elsewhere(config_of("", "distributed.num_processes=2"), FILE) == 0
    assert start.run_elsewhere(config_of(f"{HERE} slots=3"), FILE) == 0
    assert start.run_elsewhere(config_of(f"{HERE} slots=2\nother slots=2"), FILE) == 0
    (name, hosts) = started.pop()
    assert started == [("run_workers", 2), ("run_workers", 3)]
    assert name == "run_cluster"
    assert [host.name for host in hosts] == [HERE, "other"]


def test_a_hostfile_of_another_machine_alone_is_refused(config_of, started):
    with pytest.raises(ConfigError, match=r"the only machine, no-such\.invalid, is not this one"):
        start.run_elsewhere(config_of("no-such.invalid slots=2"), FILE)


def test_one_of_several_starts_nobody_and_counts_them(config_of, started, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert start.run_elsewhere(config_of("", "distributed.num_processes=2"), FILE) is None
    assert start.run_elsewhere(config_of("a slots=2\nb slots=2"), FILE) is None
    with pytest.raises(ConfigError, match="names 2 processes, and 4 were started"):
        start.run_elsewhere(config_of("a slots=1\nb slots=1"), FILE)
    assert started == []


def test_more_processes_than_gpus_are_refused(config_of, monkeypatch):
    with_gpus(monkeypatch, 2)
    (problem,) = start.machine_problems(config_of("", "distributed.num_processes=3"))
    assert problem.key == "distributed.num_processes"
    assert problem.message == "3 processes, and this machine has 2 GPUs: each needs one of its own"
    (problem,) = start.machine_problems(config_of(f"{HERE} slots=4"))
    assert problem.key == "distributed.hostfile"
    assert not list(start.machine_problems(config_of("", "distributed.num_processes=2")))
    assert not list(start.machine_problems(config_of()))
    on_cpu = config_of("", "distributed.num_processes=3", "distributed.device=cpu")
    assert not list(start.machine_problems(on_cpu))


def test_without_gpus_processes_are_not_counted(config_of, monkeypatch):
    with_gpus(monkeypatch, 0)
    assert not list(start.machine_problems(config_of("", "distributed.num_processes=8")))
    # That there is no GPU is told elsewhere.
    config = config_of("", "distributed.num_processes=8", "distributed.device=cuda")
    assert not list(start.machine_problems(config))


def test_a_missing_ssh_is_a_problem_where_it_is_needed(config_of, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    config = config_of(f"{HERE} slots=1\nother slots=1")
    (problem,) = start.machine_problems(config)
    assert problem.key == "distributed.hostfile"
    assert "ssh is not on the PATH" in problem.message
    assert not list(start.machine_problems(config_of(f"{HERE} slots=1")))
    monkeypatch.setenv("WORLD_SIZE", "2")  # the other machine's processes start nobody
    assert not list(start.machine_problems(config))


def test_processes_of_machines_are_cut_into_even_groups(config_of, monkeypatch):
    monkeypatch.setattr(start.shutil, "which", lambda name: name)
    hosts = f"{HERE} slots=3\nother slots=3"
    for size, fine in ((1, True), (2, True), (3, True), (4, False)):
        config = config_of(hosts, f"distributed.sequence_parallel={size}")
        found = list(start.machine_problems(config))
        assert (found == []) is fine
    assert found[0].key == "distributed.sequence_parallel"
    assert found[0].hint == "set it to one of 1, 2, 3, 6"


def test_a_task_of_srun_takes_its_place(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "x")  # so that it is put back at the end
        monkeypatch.delenv(name)
    for name, value in {"JOB_ID": "1", "STEP_ID": "0", "NTASKS": "2", "PROCID": "1",
                        "LOCALID": "1", "JOB_NODELIST": "n[1-2]"}.items():  # fmt: skip
        monkeypatch.setenv(f"SLURM_{name}", value)
    start.take_place()
    assert (os.environ["RANK"], os.environ["MASTER_ADDR"]) == ("1", "n1")
