"""The rows of `menma bench --grid`: configs that show what each way to save memory costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer.contract.variants import get_variant

RANK = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One config of the grid: a LoRA of rank 32 on one clip at a time."""

    variant: str
    width: int
    height: int
    num_frames: int = 81
    memory: Mapping[str, Any] = field(default_factory=dict)
    """Keys of `[memory]` that are not the defaults."""
    shape: Mapping[str, int] = field(default_factory=dict)
    """Of `model.shape`, for sizes that are not released."""

    @property
    def clip(self) -> str:
        """The clip as people write it."""
        return f"{self.width}x{self.height}x{self.num_frames}"

    @property
    def settings(self) -> str:
        """The precision, then what else differs from the defaults."""
        rest = dict(self.memory)
        words = [str(rest.pop("weight_format", "bf16"))]
        return ", ".join([*words, *(_words(key, value) for key, value in rest.items())])

    @property
    def name(self) -> str:
        """Tells it from all others."""
        return f"{self.model} {self.clip} {self.settings}"

    @property
    def model(self) -> str:
        """The variant; `tiny` where it is not of the released size."""
        return f"tiny {self.variant}" if self.shape else self.variant

    def config(self) -> dict[str, Any]:
        """Return the content of a config file."""
        source = {
            "video_directory": "clips",
            "resolution": [self.width, self.height],
            "target_frames": [self.num_frames],
        }
        return {
            "name": "bench",
            "model": {"variant": self.variant, "shape": dict(self.shape)},
            "dataset": {"sources": [source]},
            "adapter": {"kind": "lora", "rank": RANK},
            "memory": dict(self.memory),
            "distributed": {"num_processes": 1},
        }


def gpu_rows() -> tuple[Row, ...]:
    """Return the rows for a CUDA GPU: released shapes; 14B with each way to save memory."""
    large = "wan2.1-t2v-14b"
    swap = {"blocks_to_swap": get_variant(large).transformer.num_layers}
    scaled = {"weight_format": "fp8_scaled"}
    chunks = {"feed_forward_chunks": 4, "attention_chunks": 4}
    ways: tuple[dict[str, Any], ...] = (
        {},
        swap,
        {**swap, **chunks},
        scaled,
        {**scaled, **chunks},
        {**scaled, "fp8_matmul": True},
        {**scaled, **swap},
        {"keep_attention": True},
        {"feed_forward_chunks": 4},
        {"compile_blocks": True},
    )
    return (
        Row(variant="wan2.1-t2v-1.3b", width=480, height=480),
        Row(variant="wan2.1-t2v-1.3b", width=832, height=480),
        Row(variant="wan2.2-ti2v-5b", width=1280, height=704),
        Row(variant=large, width=480, height=480),
        Row(variant=large, width=480, height=480, memory=swap),
        *(Row(variant=large, width=832, height=480, memory=memory) for memory in ways),
    )


def sampling_rows() -> tuple[Row, ...]:
    """Return the rows of sampling for a CUDA GPU: resident, fp8, all blocks swapped."""
    return tuple(
        Row(variant=variant, width=832, height=480, memory=memory)
        for variant in ("wan2.1-t2v-1.3b", "wan2.1-t2v-14b")
        for memory in _sampling_ways(get_variant(variant).transformer.num_layers)
    )


def tiny_sampling_rows() -> tuple[Row, ...]:
    """Return the rows of sampling for a machine without a GPU."""
    return tuple(_tiny(memory) for memory in _sampling_ways(_TINY["num_layers"]))


def _sampling_ways(num_blocks: int) -> tuple[dict[str, Any], ...]:
    swap, scaled = {"blocks_to_swap": num_blocks}, {"weight_format": "fp8_scaled"}
    return ({}, swap, scaled, {**scaled, **swap})


_TINY = {
    "dim": 64,
    "ffn_dim": 128,
    "num_heads": 2,
    "num_layers": 3,
    "text_dim": 32,
    "freq_dim": 16,
}


def _tiny(memory: dict[str, Any]) -> Row:
    return Row(
        variant="wan2.1-t2v-1.3b",
        width=64,
        height=48,
        num_frames=9,
        memory=memory,
        shape=_TINY,
    )


def cpu_rows() -> tuple[Row, ...]:
    """Return the rows for a machine without a GPU: a tiny model, to see that all of it works."""
    swap, scaled = {"blocks_to_swap": 3}, {"weight_format": "fp8_scaled"}
    ways: tuple[dict[str, Any], ...] = (
        {},
        swap,
        scaled,
        {**scaled, **swap},
        {"keep_attention": True},
        {"feed_forward_chunks": 4},
    )
    return tuple(_tiny(memory) for memory in ways)


def _words(key: str, value: Any) -> str:
    return key if value is True else f"{key}={value}"
