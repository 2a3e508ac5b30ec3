"""The processes of a machine hold swapped blocks once: the same bits, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.swap.shared_ranks import FORMATS, SWAPPED
from tests.swap.swapped_models import CONFIG, assert_equal, make_model, train
from tests.warm import start as warm
from trainer.engine.process_group import World
from trainer.jobs.neighbours import neighbours
from trainer.memory.block_swap import BlockSwap
from trainer.memory.host_share import HostShare
from trainer.memory.streams import PAGE, HostStreams
from trainer.models.wan.loading import save_transformer
from trainer.models.wan.transformer import WanTransformer

ROOT = Path(__file__).parents[2]
linux = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="shared memory needs Linux")
BLOCK_LINEARS = 10
"""Of a text-to-video block: four each in two attentions, and two of the feed-forward."""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("shared")
    save_transformer(WanTransformer(CONFIG), folder / "model.safetensors")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    done = warm.run(
        [sys.executable, "-m", "tests.swap.shared_ranks", str(folder)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 128 + signal.SIGKILL, done.stderr[-4000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@linux
@pytest.mark.slow
@pytest.mark.parametrize("weights", FORMATS)
def test_sharing_changes_no_bit(seen: list[dict[str, Any]], weights: str) -> None:
    for rank in seen:
        assert rank[weights]["shared"] == rank[weights]["plain"]
        assert rank[weights]["kept"]
    assert seen[0][weights]["digest"] == seen[1][weights]["digest"]
    assert seen[0][weights]["plain"] != seen[1][weights]["plain"]  # each has batches of its own


@linux
@pytest.mark.slow
@pytest.mark.parametrize("weights", FORMATS)
def test_the_memory_is_one(seen: list[dict[str, Any]], weights: str) -> None:
    (one,), (other,) = (rank[weights]["mapped"] for rank in seen)
    assert one["file"] == other["file"]
    for mapped in (one, other):
        assert mapped["Rss"] >= SWAPPED * PAGE // 1024
        assert 2 * mapped["Pss"] == pytest.approx(mapped["Rss"], abs=4)
        assert not seen[0][weights]["may_write"]


@linux
@pytest.mark.slow
def test_only_the_leader_reads_and_rounds_streamed_blocks(seen: list[dict[str, Any]]) -> None:
    rounded = [rank["fp8_scaled"]["rounded"] for rank in seen]
    own = CONFIG.num_layers - SWAPPED
    assert rounded == [CONFIG.num_layers * BLOCK_LINEARS, own * BLOCK_LINEARS]


@linux
@pytest.mark.slow
def test_failures_are_everybody_s(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert "different weights" in rank["other weights"]
        assert "nowhere" in rank["leader fails"]


@linux
@pytest.mark.slow
def test_nothing_is_left_after_a_kill(seen: list[dict[str, Any]]) -> None:
    (mapped,) = seen[1]["before the end"]
    assert seen[0]["before the end"][0]["file"] == mapped["file"]
    device, _, inode = mapped["file"].rpartition(":")
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            lines = maps.read_text().splitlines()
        except OSError:
            continue  # gone, or another user's
        assert not any(line.split()[3:5] == [device, inode] for line in lines), maps
    if Path("/dev/shm").is_dir():
        assert not any("menma" in path.name for path in Path("/dev/shm").iterdir())


@linux
def test_one_process_alone_shares_with_itself() -> None:
    expected = train(*make_model())
    model, trainable = make_model()
    told: list[str] = []

    def tell(text: str) -> str:
        told.append(text)
        return text

    share = HostShare(leads=True, tell=tell)
    model.blocks.swap = BlockSwap(model.blocks, SWAPPED, HostStreams(), share=share)
    assert_equal(train(model, trainable), expected)
    assert [bool(text) for text in told] == [True, False]
    hosts = [flat.host for flat in model.blocks.swap._flats]
    assert len({host.untyped_storage().data_ptr() for host in hosts}) == 1
    assert {host.data_ptr() % PAGE for host in hosts} == {0}


def test_a_single_process_has_no_neighbours() -> None:
    assert neighbours(World.alone()) is None


@linux
def test_processes_are_told_apart_by_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    machines = ["a", "b", "b", "c"]
    leaders = []
    for rank in range(4):
        world = World(rank, 4, 0, torch.device("cpu"))
        texts = iter([machines, ["0", "1", "2", "3"]])
        monkeypatch.setattr(World, "gather_texts", lambda *_, texts=texts: next(texts))
        share = neighbours(world)
        assert share is not None
        leaders.append((share.leads, share.tell("")))
    assert leaders == [(True, "0"), (True, "1"), (False, "1"), (True, "3")]
