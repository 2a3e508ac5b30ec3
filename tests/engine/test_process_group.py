"""A process's place, read from its environment."""

from __future__ import annotations

import pytest
import torch

from trainer.contract.errors import ConfigError
from trainer.engine import process_group
from trainer.engine.process_group import World, in_group


def place(**environment):
    return process_group._place("cpu", environment)


def test_alone_without_an_environment():
    world = place()
    assert world == World.alone()
    assert not in_group({})
    assert world.any_rank(True)
    assert not world.any_rank(False)
    assert world.gather(torch.tensor([1.0, 2.0])).tolist() == [[1.0, 2.0]]
    assert world.gather_texts("x" * 9999) == ["x" * 9999]


def test_one_of_several():
    world = place(RANK="3", WORLD_SIZE="4", LOCAL_RANK="1")
    assert (world.rank, world.world_size, world.local_rank) == (3, 4, 1)
    assert in_group({"WORLD_SIZE": "4"})


@pytest.mark.parametrize(
    ("environment", "word"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK"),
        ({"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK"),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK is 2"),
        ({"RANK": "-1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK"),
    ],
)
def test_a_wrong_environment_is_explained(environment, word):
    with pytest.raises(ConfigError, match=word):
        place(**environment)


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="1 are visible"):
        process_group._place("cuda", {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"})


def test_where_to_meet():
    assert process_group._rendezvous({"MENMA_RENDEZVOUS": "file:///x"}) == "file:///x"
    assert process_group._rendezvous({"MASTER_ADDR": "a", "MASTER_PORT": "1"}) == "env://"
    with pytest.raises(ConfigError, match="MASTER_PORT"):
        process_group._rendezvous({"MASTER_ADDR": "a"})
