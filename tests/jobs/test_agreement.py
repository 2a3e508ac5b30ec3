"""Processes that do not stand on the same ground are told apart by their machines."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.contract.errors import ConfigError, DataError
from trainer.engine.process_group import World
from trainer.jobs import agreement
from trainer.jobs.agreement import require_same, require_shared_folder


class Others:
    """A world of several ranks, seen from one; what the others say is made from what it says."""

    def __init__(self, rank: int, answers: list[Callable[[str], str]]) -> None:
        self.rank = rank
        self.world_size = len(answers)
        self._answers = answers

    def gather_texts(self, text: str) -> list[str]:
        """Return this rank's text among those of the others."""
        return [text if i == self.rank else say(text) for i, say in enumerate(self._answers)]

    def text_of_rank_0(self, text: str) -> str:
        """Return rank 0's text."""
        return self.gather_texts(text)[0]

    def barrier(self) -> None:
        """Nobody is waited for."""


def changed(**facts: str) -> Callable[[str], str]:
    return lambda text: json.dumps(json.loads(text) | facts)


def test_alone_there_is_nobody_to_differ_from():
    assert require_same(World.alone(), {"torch": "1"}) == [socket.gethostname()]


def test_the_machines_are_told_by_rank():
    world = Others(1, [changed(host="a"), str, changed(host="b")])
    assert require_same(world, {"torch": "1"}) == ["a", socket.gethostname(), "b"]


def test_every_difference_is_told_with_both_sides():
    world = Others(0, [str, changed(host="b"), changed(host="c", torch="2", dataset="")])
    with pytest.raises(ConfigError) as caught:
        require_same(world, {"torch": "1", "dataset": "x", "menma": "0.1"})
    said = caught.value.message
    here = socket.gethostname()
    assert f"torch (1: rank 0 on {here}, rank 1 on b; 2: rank 2 on c)" in said
    assert "dataset (x: " in said
    assert "unknown: rank 2 on c" in said
    assert "menma" not in said


def test_many_ranks_are_not_all_listed():
    world = Others(0, [str, *[changed(host="b", torch="2")] * 9])
    with pytest.raises(ConfigError, match="rank 4 on b and 5 more"):
        require_same(world, {"torch": "1"})


def test_a_shared_folder_is_seen_and_left_clean(tmp_path: Path):
    world = Others(0, [str, str])
    require_shared_folder(world, ["a", "b"], tmp_path / "run", 60)
    assert list((tmp_path / "run").iterdir()) == []


def test_alone_nobody_else_has_to_see(tmp_path: Path):
    require_shared_folder(World.alone(), ["a"], tmp_path / "run", 60)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_not_shared_is_refused_on_every_rank(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(agreement, "_SEEN_WITHIN_S", 0)
    yes, no = (lambda text: "yes"), (lambda text: "no")
    with pytest.raises(DataError, match=r"b, c does not see the run directory that a writes"):
        require_shared_folder(Others(0, [str, no, yes, no]), ["a", "b", "a", "c"], tmp_path, 60)
    monkeypatch.undo()  # nobody waits longer than the others wait for it
    with pytest.raises(DataError, match="b does not see"):
        require_shared_folder(Others(1, [yes, str]), ["a", "b"], tmp_path / "elsewhere", 0.1)
