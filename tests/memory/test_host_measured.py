"""Host memory of caching and sampling, against what this process takes when it does that.

On a CPU the device's memory is RAM as well; what stands there is added where it is not nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from memory_configs import make_config
from resident import can_measure, growth
from torch import Tensor, nn

from trainer.contract.config import RunConfig
from trainer.contract.dataset_config import parse_dataset
from trainer.contract.memory_model.clips import Clip
from trainer.contract.memory_model.inference_host import (
    CLIPS_AHEAD,
    READER_THREADS,
    caching_host,
    sampling_host,
    writing_host,
)
from trainer.contract.memory_model.videos import planned_videos
from trainer.contract.memory_model.workload import Workload, workload_of
from trainer.contract.variants import get_variant
from trainer.jobs.build import freeze, load_base
from trainer.jobs.cache import CacheOptions, run_cache
from trainer.jobs.window_encoder import LazyModel
from trainer.models.wan.loading import save_transformer
from trainer.models.wan.random_weights import random_transformer
from trainer.sampling.experts import ExpertSwitch
from trainer.sampling.pipeline import decode_frames
from trainer.sampling.requests import SampleRequest
from trainer.sampling.results import write_sample

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not can_measure(), reason="needs Linux' /proc/self/clear_refs"),
]
CPU = torch.device("cpu")


def test_the_cache_job_reads_as_many_clips_as_is_counted() -> None:
    options = CacheOptions()
    assert (options.num_threads, options.max_decoded) == (READER_THREADS, CLIPS_AHEAD)


class Encoder:
    """Takes no memory of its own."""

    stride = (4, 8, 8)

    def encode(self, video_BCFHW: Tensor, *, tile: tuple[int, int] | None = None) -> Tensor:
        batch, _, frames, height, width = video_BCFHW.shape
        return torch.zeros(batch, 16, (frames - 1) // 4 + 1, height // 8, width // 8)


def encode_texts(captions: Sequence[str]) -> list[Tensor]:
    return [torch.zeros(2, 8) for _ in captions]


def write_clips(folder: Path, clip: Clip, count: int) -> None:
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (clip.height, clip.width, 3), np.uint8)
    for number in range(count):
        with av.open(str(folder / f"{number}.mp4"), "w") as container:
            stream = container.add_stream("mpeg4", rate=16)
            stream.width, stream.height, stream.pix_fmt = clip.width, clip.height, "yuv420p"
            for shift in range(clip.num_frames):
                image = np.roll(noise, number + shift, axis=1)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode(None))
        (folder / f"{number}.txt").write_text("a clip", encoding="utf-8")


def test_caching_takes_what_is_estimated(tmp_path: Path) -> None:
    clip = Clip(width=512, height=320, num_frames=81)
    write_clips(tmp_path / "clips", clip, 6)
    source = {
        "video_directory": str(tmp_path / "clips"),
        "resolution": [clip.width, clip.height],
        "target_frames": [clip.num_frames],
    }
    dataset = parse_dataset({"datasets": [source]})
    with growth() as found:
        report = run_cache(
            dataset,
            variant=get_variant("wan2.1-t2v-1.3b"),
            vae=LazyModel("vae", Encoder),
            text_encoder=LazyModel("text", lambda: encode_texts),
        )
    assert report.encoded == 6
    config = make_config(resolution=(clip.width, clip.height), frames=clip.num_frames)
    parts = caching_host(workload_of(config), [clip])["latents"]
    frames = parts["decoded clips"] + parts["clip as float32"]
    # The threads are not all at their worst at once, and small videos are read with less.
    assert 0.5 * frames < found.num_bytes < frames + parts["video readers"]


def a14b(folder: Path, blocks_to_swap: int) -> tuple[RunConfig, Workload]:
    """Return a small model with two experts, whose weights are the same file."""
    shape = {"dim": 1024, "ffn_dim": 4096, "num_heads": 8, "num_layers": 8, "text_dim": 64}
    config = make_config("wan2.2-t2v-a14b", memory={"blocks_to_swap": blocks_to_swap})
    file = folder / "transformer.safetensors"
    given = {"shape": shape, "transformer": file, "transformer_high_noise": file}
    config = config.model_copy(update={"model": config.model.model_copy(update=given)})
    work = workload_of(config)
    if not file.exists():
        model = random_transformer(
            work.shape, dtype=torch.bfloat16, device="cpu", variant_name="wan2.2-t2v-a14b"
        )
        save_transformer(model, file)
    return config, workload_of(config)


@pytest.mark.parametrize("blocks_to_swap", [0, 6])
def test_two_experts_take_what_is_estimated(tmp_path: Path, blocks_to_swap: int) -> None:
    config, work = a14b(tmp_path, blocks_to_swap)
    path = config.model.transformer
    assert path is not None

    def load(_expert: str) -> nn.Module:
        return freeze(load_base(config, path, expert=None, device=CPU))

    with growth() as found:
        switch = ExpertSwitch(load, CPU)
        for expert in ("high_noise", "low_noise"):
            switch(expert)  # type: ignore[arg-type]
    videos = planned_videos(config.sampling, work.variant)
    parts = sampling_host(work, videos)["steps"]
    expected = sum(parts.values()) - parts["processes"]
    if not blocks_to_swap:  # the expert that works is on the device
        expected += work.resident_bytes
    assert found.num_bytes == pytest.approx(expected, rel=0.1)


class Decoder:
    """Makes frames that change a little."""

    def __init__(self, clip: Clip) -> None:
        self._clip = clip

    def decode_chunks(self, latents: Tensor, /) -> Iterator[Tensor]:
        for start in range(0, self._clip.num_frames, 4):
            number = min(4, self._clip.num_frames - start)
            column_W = torch.linspace(-1, 1, self._clip.width).roll(3 * start)
            yield column_W.expand(1, 3, number, self._clip.height, -1)

    def decode(self, latents: Tensor, /, *, tile: tuple[int, int] | None = None) -> Tensor:
        size = (self._clip.num_frames, self._clip.height, self._clip.width)
        return torch.zeros(1, 3, *size)


@pytest.mark.parametrize("tile", [None, 256])
def test_writing_takes_what_is_estimated(tmp_path: Path, tile: int | None) -> None:
    clip = Clip(width=640, height=384, num_frames=65)
    variant = get_variant("wan2.1-t2v-1.3b")
    request = SampleRequest.of("a", variant)
    frames = decode_frames(Decoder(clip), torch.zeros(1), tile=tile and (tile, tile))
    with growth() as found:
        write_sample(tmp_path, "sample", request, frames)
    work = workload_of(make_config(memory={"vae_tile": tile}))
    host = sum(writing_host(work, [clip]).values())
    # Pixels as float32 are on the device, three times while they are rounded.
    seen = clip.num_frames if tile else 4
    device = 3 * 4 * 3 * seen * clip.width * clip.height
    # With more than two cores x264 keeps more frames.
    assert 0.5 * host < found.num_bytes < 2.5 * host + device
