"""What `[memory]` refuses about streaming, recomputing and compiling: key, reason, way out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.swap.swapped_models import CONFIG, T2V
from trainer.contract.config import RunConfig
from trainer.contract.config_rules import check_rules
from trainer.contract.errors import ConfigError
from trainer.jobs.build import load_base
from trainer.jobs.memory_checks import compiler_problem, memory_notes, memory_problems
from trainer.models.wan.loading import save_transformer
from trainer.models.wan.transformer import WanTransformer

SWAP = "memory.blocks_to_swap"


def config_of(**sections: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate(sections)


@pytest.mark.parametrize(
    ("sections", "key", "words"),
    [
        ({"memory": {"blocks_to_swap": 31}, "model": {"variant": T2V}}, SWAP, "the model has 30"),
        ({"memory": {"blocks_to_swap": 1, "gradient_checkpointing": False}}, SWAP, "activations"),
        ({"memory": {"blocks_to_swap": 1}, "distributed": {"zero_stage": 3}}, SWAP, "ZeRO-3"),
        ({"memory": {"blocks_to_swap": 1}, "adapter": {"kind": "none"}}, SWAP, "full fine-tune"),
        (
            {"memory": {"offload_checkpoints": True, "gradient_checkpointing": False}},
            "memory.offload_checkpoints",
            "everything is kept",
        ),
        (
            {"memory": {"compile_blocks": True, "keep_attention": True}},
            "memory.compile_blocks",
            "single operators",
        ),
        (
            {"memory": {"compile_blocks": True}, "distributed": {"zero_stage": 3}},
            "memory.compile_blocks",
            "hooks",
        ),
        (
            {"memory": {"compile_blocks": True, "attention_chunks": 2}},
            "memory.compile_blocks",
            "what enters attention",
        ),
        (
            {"memory": {"compile_blocks": True, "feed_forward_chunks": 2}},
            "memory.compile_blocks",
            "plans the feed-forward",
        ),
    ],
)
def test_what_excludes_one_another_is_told(sections: dict[str, Any], key: str, words: str) -> None:
    problems = [p for p in check_rules(config_of(**sections)) if p.key == key]
    assert [words in problem.message for problem in problems] == [True]
    assert problems[0].hint


def test_what_goes_together_is_not_refused() -> None:
    memory = {
        "blocks_to_swap": 30,
        "gradient_checkpointing": 2,
        "offload_checkpoints": True,
        "feed_forward_chunks": 4,
        "attention_chunks": 4,
        "keep_attention": True,
    }
    config = config_of(memory=memory, model={"variant": T2V}, distributed={"zero_stage": 2})
    assert check_rules(config) == []


@pytest.mark.parametrize(
    ("written", "read"), [(True, True), (False, False), (1, True), (0, False), (2, 2), (7, 7)]
)
def test_checkpointing_is_a_switch_or_a_number(written: Any, read: Any) -> None:
    found = config_of(memory={"gradient_checkpointing": written}).memory.gradient_checkpointing
    assert found == read
    assert type(found) is type(read)


@pytest.mark.parametrize("wrong", [-2, "most", 1.5])
def test_other_checkpointing_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="gradient_checkpointing"):
        config_of(memory={"gradient_checkpointing": wrong})


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("swap") / "model.safetensors"
    save_transformer(WanTransformer(CONFIG), path)
    return path


def own_config(file, **memory: Any) -> RunConfig:
    return config_of(
        model={"transformer": str(file)},
        memory={"weight_format": "fp32", **memory},
        distributed={"device": "cpu"},
    )


def test_a_file_with_fewer_blocks_is_told_before_and_while_loading(file) -> None:
    config = own_config(file, blocks_to_swap=7)
    (problem,) = memory_problems(config, trains=True)
    assert (problem.key, "the model has 6" in problem.message) == (SWAP, True)
    with pytest.raises(ConfigError, match="the model has 6"):
        load_base(config, file, expert=None, device=torch.device("cpu"))


def test_swapping_on_a_cpu_is_remarked_upon(file) -> None:
    assert memory_problems(own_config(file, blocks_to_swap=6), trains=True) == []
    assert ["CPU" in note for note in memory_notes(own_config(file, blocks_to_swap=6))] == [True]
    assert list(memory_notes(own_config(file))) == []


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    problem = compiler_problem()
    assert problem is not None
    assert problem.key == "memory.compile_blocks"
    assert "g++" in problem.message


def test_the_options_reach_the_model(file) -> None:
    config = own_config(
        file,
        blocks_to_swap=4,
        offload_checkpoints=True,
        feed_forward_chunks=3,
        attention_chunks=2,
        gradient_checkpointing=2,
    )
    model = load_base(config, file, expert=None, device=torch.device("cpu"))
    assert model.blocks.swap is not None
    assert len(model.blocks.swap.streamed) == 4
    assert model.blocks.offload is not None
    assert model.gradient_checkpointing == 2
    assert {block.feed_forward_chunks for block in model.blocks} == {3}
    assert {block.self_attn.chunks for block in model.blocks} == {2}
    assert {block.cross_attn.chunks for block in model.blocks} == {2}
