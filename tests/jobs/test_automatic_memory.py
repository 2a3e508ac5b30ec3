"""`auto` on this machine: the card that is measured, the ranks that agree, what the jobs say."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.swap.swapped_models import CONFIG
from trainer.contract.config import RunConfig
from trainer.contract.errors import ConfigError, RunError
from trainer.contract.memory_model import Clip, Gpu, estimate, find_gpu, gpu_of_memory
from trainer.contract.memory_model.denoising import WorkingSet
from trainer.contract.variants import VARIANTS
from trainer.engine.process_group import World
from trainer.jobs import automatic_memory
from trainer.jobs.automatic_memory import (
    memory_values,
    resolve_for_forwards,
    resolve_for_training,
    usable_gpu,
)
from trainer.jobs.build import load_base
from trainer.jobs.memory_checks import memory_notes
from trainer.models.wan.loading import save_transformer
from trainer.models.wan.transformer import WanTransformer

GIB = 2**30
T2V = VARIANTS["wan2.1-t2v-14b"]
AUTO = {"blocks_to_swap": "auto", "gradient_checkpointing": "auto"}
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def config_of(folder: Path, **memory: Any) -> RunConfig:
    source = {"video_directory": "clips", "resolution": (832, 480), "target_frames": [33]}
    return RunConfig.model_validate(
        {
            "dataset": {"sources": [source]},
            "memory": {**AUTO, **memory},
            "output": {"runs_dir": folder / "runs"},
        }
    )


@dataclass
class Log:
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def __call__(self, kind: str, /, **fields: Any) -> None:
        self.events.append((kind, fields))

    def of(self, kind: str) -> list[str]:
        return [fields["message"] for name, fields in self.events if name == kind]


class Ranks:
    """Stands in for a `World` of several ranks, which run one after the other."""

    def __init__(self, cards: list[Gpu | None]) -> None:
        self.cards = cards
        self.told = ""

    def place(self, rank: int) -> Any:
        ranks = self

        @dataclass
        class Place:
            rank: int
            world_size: int = len(ranks.cards)
            device: torch.device = CUDA

            def gather_texts(self, text: str) -> list[str]:
                own = ranks.cards[self.rank]
                assert text == ("" if own is None else json.dumps([own.memory_gib, own.name]))
                return [
                    "" if card is None else json.dumps([card.memory_gib, card.name])
                    for card in ranks.cards
                ]

            def text_of_rank_0(self, text: str) -> str:
                if self.rank == 0:
                    ranks.told = text
                assert len(ranks.told.encode()) <= 4096
                return ranks.told

        return Place(rank)


@pytest.fixture
def run_ranks(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    def run(config: RunConfig, cards: list[Gpu | None]) -> tuple[list[RunConfig], list[Log]]:
        ranks, configs, logs = Ranks(cards), [], []
        for rank, card in enumerate(cards):
            monkeypatch.setattr(automatic_memory, "usable_gpu", lambda *_, own=card, **__: own)
            logs.append(Log())
            configs.append(resolve_for_training(config, T2V, ranks.place(rank), logs[-1]))
        return configs, logs

    return run


def test_the_smallest_card_of_all_ranks_decides_for_all(run_ranks, tmp_path) -> None:
    small, large = find_gpu("RTX 4090"), find_gpu("H200")
    config = config_of(tmp_path)
    configs, logs = run_ranks(config, [large, small, large])
    values = [memory_values(one) for one in configs]
    assert values[0] == values[1] == values[2]
    assert values[0]["blocks_to_swap"] > 0
    assert "for RTX 4090" in logs[0].of("log")[0]
    alone, _ = run_ranks(config, [large])
    assert memory_values(alone[0])["blocks_to_swap"] == 0
    assert config.memory.blocks_to_swap == "auto"  # the user's own is not touched


def test_no_rank_goes_on_where_nothing_fits(run_ranks, tmp_path, monkeypatch) -> None:
    config = config_of(tmp_path)
    with pytest.raises(RunError, match="no value of memory") as first:
        run_ranks(config, [gpu_of_memory(4), find_gpu("H200")])
    assert "--fit" in first.value.hint
    ranks = Ranks([find_gpu("H200"), gpu_of_memory(4)])
    monkeypatch.setattr(automatic_memory, "usable_gpu", lambda *_, **__: find_gpu("H200"))
    with pytest.raises(RunError):
        resolve_for_training(config, T2V, ranks.place(0), Log())
    monkeypatch.setattr(automatic_memory, "usable_gpu", lambda *_, **__: gpu_of_memory(4))
    with pytest.raises(RunError, match="no value of memory"):
        resolve_for_training(config, T2V, ranks.place(1), Log())


def test_a_dataset_that_cannot_be_read_is_a_mistake_on_every_rank(run_ranks, tmp_path) -> None:
    config = config_of(tmp_path)
    missing = config.dataset.model_copy(update={"file": tmp_path / "none.toml", "sources": ()})
    with pytest.raises(ConfigError, match=r"none\.toml"):
        run_ranks(config.model_copy(update={"dataset": missing}), [find_gpu("H200")])


def test_a_tight_fit_goes_on_with_a_warning(run_ranks, tmp_path) -> None:
    config = config_of(tmp_path)
    memory = config.memory.model_copy(update={"blocks_to_swap": 40, "gradient_checkpointing": True})
    model = config.model.model_copy(update={"variant": T2V.name})
    smallest = estimate(config.model_copy(update={"memory": memory, "model": model}))
    card = gpu_of_memory(smallest.phase("training").peak_bytes / GIB + 0.05)
    _, logs = run_ranks(config, [card])
    assert "less than the margin" in logs[0].of("warning")[0]


def test_on_a_cpu_nothing_is_swapped_and_it_is_said(tmp_path) -> None:
    log = Log()
    config = resolve_for_training(config_of(tmp_path), T2V, World.alone(), log)
    assert memory_values(config) == {"blocks_to_swap": 0, "gradient_checkpointing": True}
    assert "CPU" in log.of("log")[0]
    here = config_of(tmp_path).model_copy(
        update={"distributed": config.distributed.model_copy(update={"device": "cpu"})}
    )
    assert [log.of("log")[0]] == list(memory_notes(here))  # what `menma check` says


def test_what_is_not_auto_is_not_touched(tmp_path) -> None:
    log = Log()
    config = config_of(tmp_path, blocks_to_swap=0, gradient_checkpointing=2)
    assert resolve_for_training(config, T2V, World.alone(), log) is config
    assert resolve_for_forwards(config, T2V, CPU, [], log) is config
    assert log.events == []
    assert memory_values(config) == {"blocks_to_swap": 0, "gradient_checkpointing": 2}


def test_sampling_decides_by_its_own_clips_and_needs_no_dataset(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(automatic_memory, "usable_gpu", lambda *_, **__: gpu_of_memory(20))
    config = config_of(tmp_path)
    gone = config.dataset.model_copy(update={"file": tmp_path / "none.toml", "sources": ()})
    config = config.model_copy(update={"dataset": gone})
    log = Log()
    clips = [WorkingSet(clip=Clip(width=832, height=480, num_frames=frames)) for frames in (1, 81)]
    image, video = (
        resolve_for_forwards(config, T2V, CUDA, [clip], log).memory.swapped_blocks for clip in clips
    )
    assert 0 < image < video
    assert len(log.of("log")) == 2
    monkeypatch.setattr(automatic_memory, "usable_gpu", lambda *_, **__: gpu_of_memory(2))
    with pytest.raises(RunError, match="sampling takes"):
        resolve_for_forwards(config, T2V, CUDA, clips, log)


def test_runs_of_this_machine_correct_the_choice(run_ranks, tmp_path) -> None:
    card = find_gpu("RTX 4090")
    config = config_of(tmp_path)
    config = config.model_copy(
        update={"model": config.model.model_copy(update={"variant": T2V.name})}
    )
    before, _ = run_ranks(config, [card])
    run = tmp_path / "runs" / "earlier"
    run.mkdir(parents=True)
    from trainer.contract.config_io import dump_config

    (run / "config.toml").write_text(dump_config(config, base=tmp_path), encoding="utf-8")
    values = memory_values(before[0])
    (run / "environment.json").write_text(json.dumps({"memory": values}), encoding="utf-8")
    theirs = estimate(before[0]).phase("training")
    size = 1.2 * (theirs.peak_bytes - theirs.parts["CUDA context"]) / GIB
    (run / "peaks.json").write_text(json.dumps({"peak_vram_gib": size}), encoding="utf-8")
    after, _ = run_ranks(config, [card])
    more = memory_values(after[0])
    assert more["blocks_to_swap"] > values["blocks_to_swap"]


@pytest.mark.parametrize(("free", "world_size"), [(23.0, 1), (18.0, 1), (18.0, 4)])
def test_the_card_has_what_is_free_and_what_this_process_holds(
    monkeypatch: pytest.MonkeyPatch, free: float, world_size: int
) -> None:
    total = 23.6
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free * GIB, total * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: GIB // 4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA GeForce RTX 4090")
    card = usable_gpu(CUDA, world_size=world_size)
    assert card is not None
    held = 0.25 + 0.55 + (0.3 if world_size > 1 else 0)  # torch's, the context, NCCL
    assert card.memory_gib == pytest.approx(min(total, free + held))
    assert card.bf16_tflops == find_gpu("RTX 4090").bf16_tflops
    assert usable_gpu(CPU) is None


def test_what_auto_becomes_is_what_is_streamed(tmp_path, monkeypatch) -> None:
    file = tmp_path / "model.safetensors"
    save_transformer(WanTransformer(CONFIG), file)
    config = config_of(tmp_path, weight_format="fp32", gradient_checkpointing=True)
    model = config.model.model_copy(update={"transformer": file})
    config = config.model_copy(update={"model": model})

    def needed(blocks: int) -> int:
        memory = config.memory.model_copy(update={"blocks_to_swap": blocks})
        result = estimate(config.model_copy(update={"memory": memory})).only("training")
        return result.peak_bytes + result.margin_bytes

    assert needed(4) < needed(3)
    card = gpu_of_memory(needed(4) / GIB)
    monkeypatch.setattr(automatic_memory, "usable_gpu", lambda *_, **__: card)
    variant = VARIANTS["wan2.1-t2v-1.3b"]
    resolved = resolve_for_training(config, variant, World.alone(), Log())
    assert resolved.memory.swapped_blocks == 4
    loaded = load_base(resolved, file, expert=None, device=CPU)
    assert loaded.blocks.swap is not None
    assert len(loaded.blocks.swap.streamed) == 4
