"""Samples that fail: the others are made, what is drawn is written, the words say what to do."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.sampling.sampling_fakes import FakeTransformer, FakeVae
from trainer.contract.config import Prompt
from trainer.contract.errors import DiskError, NonFiniteError, OutOfMemoryError
from trainer.contract.variants import get_variant
from trainer.jobs.sample import Part, SampleLoaders, SampleOptions, run_sample
from trainer.sampling.requests import SampleRequest
from trainer.sampling.results import FileOptions

T2V = get_variant("wan2.1-t2v-1.3b")
OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB."


class Breaking(FakeTransformer):
    """Fails where the latents are as wide as a sample that shall not work."""

    def __init__(self, width: int, error: BaseException | None) -> None:
        super().__init__()
        self.width, self.error = width, error

    def forward(self, latents: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if latents.shape[-1] * 8 == self.width:
            if self.error is None:
                return latents * float("nan")
            raise self.error
        return super().forward(latents, *args, **kwargs)


class BreakingVae(FakeVae):
    """Cannot decode latents of one width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def decode_chunks(self, latents: Tensor, /) -> Any:
        if latents.shape[-1] * 8 == self.width:
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)
        return super().decode_chunks(latents)


def loaders(
    transformer: Callable[[], nn.Module] = FakeTransformer, vae: Callable[[], Any] = FakeVae
) -> SampleLoaders:
    return SampleLoaders(
        text_encoder=lambda: lambda texts: [torch.ones(3, 4) for _ in texts],
        transformer=lambda _expert: transformer(),
        vae=vae,
    )


def requests(*widths: int) -> list[SampleRequest]:
    fields = {"height": 32, "num_frames": 5, "num_steps": 2, "guidance_scale": 1.0}
    return [
        SampleRequest.of(
            Prompt.model_validate({"prompt": f"width {width}", "width": width, **fields}),
            T2V,
            index=index,
        )
        for index, width in enumerate(widths)
    ]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("error", "raised", "words"),
    [
        (None, NonFiniteError, "became NaN or infinite"),
        (torch.OutOfMemoryError(OUT_OF_MEMORY), OutOfMemoryError, "Tried to allocate"),
        (MemoryError(), OutOfMemoryError, "the host is out of memory"),
    ],
)
def test_one_sample_fails_and_the_others_are_made(
    tmp_path: Path, error: BaseException | None, raised: Any, words: str
) -> None:
    told: list[str] = []
    with pytest.raises(raised, match=words) as caught:
        run_sample(
            requests(32, 48, 64),
            T2V,
            loaders(lambda: Breaking(48, error)),
            tmp_path,
            SampleOptions(on_failure=told.append),
        )
    assert names(tmp_path) == ["sample_00_42.mp4", "sample_02_44.mp4"]
    assert "2 of 3 samples are made and written" in caught.value.message
    assert len(told) == 1
    if raised is OutOfMemoryError:
        assert "sample 1 ('width 48', 48x32, 5 frames)" in caught.value.message
        for setting in ("--width", "blocks_to_swap", "fp8_scaled", "sequence_parallel"):
            assert setting in caught.value.hint
        assert caught.value.exit_code == 1


def test_the_same_bits_beside_a_sample_that_fails(tmp_path: Path) -> None:
    # PNGs: x264 does not give the same bits each time.
    options = SampleOptions(files=FileOptions(format="png", metadata=False))
    whole = run_sample(requests(32, 48, 64), T2V, loaders(), tmp_path / "whole", options)
    breaking = loaders(lambda: Breaking(48, None))
    with pytest.raises(NonFiniteError):
        run_sample(requests(32, 48, 64), T2V, breaking, tmp_path / "two", options)
    for index in (0, 2):
        pictures = sorted(whole[index].path.iterdir())
        assert len(pictures) == 5
        for picture in pictures:
            other = tmp_path / "two" / picture.parent.name / picture.name
            assert picture.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError("a bug")])
def test_what_stops_the_run_leaves_what_is_drawn(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        run_sample(
            requests(32, 48, 64), T2V, loaders(lambda: Breaking(48, error)), tmp_path / "out"
        )
    assert names(tmp_path / "out") == ["sample_00_42.mp4"]


def test_processes_that_share_a_video_do_not_go_on_without_memory(tmp_path: Path) -> None:
    broken = torch.OutOfMemoryError(OUT_OF_MEMORY)
    options = SampleOptions(part=Part(is_shared=True))
    with pytest.raises(OutOfMemoryError):
        run_sample(
            requests(32, 48, 64), T2V, loaders(lambda: Breaking(48, broken)), tmp_path, options
        )
    assert names(tmp_path) == ["sample_00_42.mp4"]


def test_decoding_that_does_not_fit_names_the_tiles(tmp_path: Path) -> None:
    with pytest.raises(OutOfMemoryError, match="sample 0") as caught:
        run_sample(requests(48, 32), T2V, loaders(vae=lambda: BreakingVae(48)), tmp_path)
    assert names(tmp_path) == ["sample_00_42.safetensors", "sample_01_43.mp4"]
    assert "memory.vae_tile" in caught.value.hint


def test_a_text_encoder_that_does_not_fit_says_so(tmp_path: Path) -> None:
    def broken() -> Any:
        raise torch.OutOfMemoryError(OUT_OF_MEMORY)

    parts = SampleLoaders(text_encoder=broken, transformer=lambda _: FakeTransformer(), vae=FakeVae)
    with pytest.raises(OutOfMemoryError) as caught:
        run_sample(requests(32), T2V, parts, tmp_path / "out")
    assert "text_encoder" in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_a_full_disk_ends_the_run_after_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.jobs import sample_write

    write, written = sample_write.write_files, []

    def one_only(*args: Any, **kwargs: Any) -> Path:
        if written:
            raise DiskError("cannot write: no space left on the device")
        written.append(write(*args, **kwargs))
        return written[-1]

    monkeypatch.setattr(sample_write, "write_files", one_only)
    with pytest.raises(DiskError, match="1 of 3 samples are made and written"):
        run_sample(requests(32, 48, 64), T2V, loaders(), tmp_path)
    assert names(tmp_path) == ["sample_00_42.mp4"]


def test_models_are_let_go_before_what_is_left_is_decoded(tmp_path: Path) -> None:
    alive: list[weakref.ref[nn.Module]] = []

    def transformer() -> nn.Module:
        made = Breaking(48, torch.OutOfMemoryError(OUT_OF_MEMORY))
        alive.append(weakref.ref(made))
        return made

    def vae() -> FakeVae:
        assert alive, "nothing was drawn"
        assert alive[0]() is None, "the transformer still holds the memory"
        return FakeVae()

    with pytest.raises(OutOfMemoryError):
        run_sample(requests(32, 48), T2V, loaders(transformer, vae), tmp_path)
    assert names(tmp_path) == ["sample_00_42.mp4"]
