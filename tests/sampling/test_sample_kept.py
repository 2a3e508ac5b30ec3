"""What is drawn is not lost when the decoding is: it is kept as latents."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_sample_failures import T2V, Breaking, loaders, names, requests
from test_sample_run import config, models
from test_sample_session import talk

from tests.sampling.sampling_fakes import FakeVae
from trainer.contract.errors import DiskError
from trainer.engine.launch import worker_environment
from trainer.jobs import sample, sample_write
from trainer.jobs.sample import SampleOptions, run_sample
from trainer.jobs.sample_kept import KeptLatents, undisturbed
from trainer.sampling import results
from trainer.sampling.latent_files import read_latents
from trainer.sampling.results import FileOptions

__all__ = ["config", "models"]


class StoppedVae(FakeVae):
    """A signal comes while it decodes latents of one width."""

    def decode_chunks(self, latents: torch.Tensor, /) -> Any:
        if latents.shape[-1] * 8 == 48:
            raise KeyboardInterrupt
        return super().decode_chunks(latents)


def stopped(folder: Path, **files: Any) -> list[str]:
    """Sample three, and be interrupted in the decoding of the second; return what was told."""
    told: list[str] = []
    options = SampleOptions(
        files=FileOptions(**files), on_kept=lambda kept: told.append(kept.words())
    )
    with pytest.raises(KeyboardInterrupt):
        run_sample(requests(32, 48, 64), T2V, loaders(vae=StoppedVae), folder, options)
    return told


def test_a_signal_while_decoding_keeps_the_latents(tmp_path: Path) -> None:
    (told,) = stopped(tmp_path / "out")
    kept = ["sample_01_43.safetensors", "sample_02_44.safetensors"]
    assert names(tmp_path / "out") == ["sample_00_42.mp4", *kept]
    assert all(name in told for name in kept)
    assert "--decode" in told
    whole = run_sample(
        requests(32, 48, 64), T2V, loaders(), tmp_path / "whole",
        SampleOptions(files=FileOptions(format="latents")),
    )  # fmt: skip
    for name, one in zip(kept, whole[1:], strict=True):
        found, wanted = read_latents(tmp_path / "out" / name), read_latents(one.path)
        assert torch.equal(found.latents_CFHW, wanted.latents_CFHW)
        assert found.metadata == wanted.metadata
        assert found.metadata["prompt"] == one.request.prompt


def test_latents_that_are_wanted_anyway_are_kept_once(tmp_path: Path) -> None:
    stopped(tmp_path, save_latents=True)
    assert names(tmp_path) == [
        "sample_00_42.mp4", *(f"sample_0{i}_{42 + i}.safetensors" for i in range(3))
    ]  # fmt: skip


def test_what_is_kept_replaces_nothing(tmp_path: Path) -> None:
    """Nobody asked for that file: not even `--force` did."""
    (tmp_path / "sample_01_43.safetensors").write_bytes(b"a LoRA")
    stopped(tmp_path, force=True)
    assert (tmp_path / "sample_01_43.safetensors").read_bytes() == b"a LoRA"
    assert (tmp_path / "sample_01_43_2.safetensors").exists()


def test_a_signal_while_drawing_keeps_the_latents_until_they_are_decoded(tmp_path: Path) -> None:
    """Whoever sends SIGTERM may send SIGKILL before the decoding ends."""
    seen: list[list[str]] = []

    class Looking(FakeVae):
        def decode_chunks(self, latents: torch.Tensor, /) -> Any:
            seen.append(names(tmp_path))
            return super().decode_chunks(latents)

    parts = loaders(lambda: Breaking(64, KeyboardInterrupt()), Looking)
    with pytest.raises(KeyboardInterrupt):
        run_sample(requests(32, 48, 64), T2V, parts, tmp_path)
    latents = ["sample_00_42.safetensors", "sample_01_43.safetensors"]
    assert [[name for name in one if name[0] != "."] for one in seen] == [
        latents, ["sample_00_42.mp4", latents[1]]
    ]  # fmt: skip
    assert names(tmp_path) == ["sample_00_42.mp4", "sample_01_43.mp4"]


def test_what_is_kept_stays_until_the_same_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Latents that are wanted take its name; where they cannot be written, it is as it was."""
    seen: list[int] = []

    def full(*_arguments: Any, **_rest: Any) -> None:
        seen.append(len(list(tmp_path.glob("*.safetensors"))))
        raise DiskError("no space left")

    monkeypatch.setattr(results, "write_latents", full)
    parts = loaders(lambda: Breaking(64, KeyboardInterrupt()))
    told: list[str] = []
    options = SampleOptions(
        files=FileOptions(save_latents=True), on_kept=lambda kept: told.append(kept.words())
    )
    with pytest.raises((DiskError, KeyboardInterrupt)):
        run_sample(requests(32, 48, 64), T2V, parts, tmp_path, options)
    kept = ["sample_00_42.safetensors", "sample_01_43.safetensors"]
    assert names(tmp_path) == kept
    assert seen
    assert set(seen) == {2}, "of each sample one file is there all the time"
    assert all(str(tmp_path / name) in told[0] for name in kept)


def test_a_second_signal_waits_until_all_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = sample._Run._write_latents

    def disturbed(*arguments: Any) -> Path:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        return write(*arguments)

    monkeypatch.setattr(sample._Run, "_write_latents", disturbed)
    stopped(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_handlers_are_those_of_before() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with undisturbed():
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_full_disk_keeps_what_it_takes(tmp_path: Path) -> None:
    def write(index: int, _latents: torch.Tensor) -> Path:
        if index == 0:
            raise DiskError("no space left")
        return tmp_path / "one"

    kept = KeptLatents(write)
    kept.keep({0: torch.ones(1), 1: torch.ones(1)})
    assert kept.paths == {1: tmp_path / "one"}
    kept.done(1)  # a file that is gone is no error


def test_a_session_keeps_what_it_cannot_decode(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, broken = sample_write.decode_frames, [True]

    def frames(*arguments: Any, **rest: Any) -> Any:
        if broken and broken.pop():
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(*arguments, **rest)

    monkeypatch.setattr(sample_write, "decode_frames", frames)
    line = {"prompt": {"prompt": "a cat", "seed": 7}}
    first, second, _ = talk(config, monkeypatch, line, line)
    (kept,) = (tmp_path / "out").glob("*.safetensors")
    assert [event["type"] for event in first if event["type"] != "step"][-2:] == [
        "warning", "error"
    ]  # fmt: skip
    assert kept.name in first[-2]["message"]
    assert read_latents(kept).metadata["seed"] == 7
    assert [event["type"] for event in second][-1] == "sample"


WORKER = """
import signal, sys, time, pathlib
from trainer import __main__ as entry
from trainer.jobs import base, sample_write
def frames(vae, latents, **rest):
    pathlib.Path(sys.argv[3]).touch()
    time.sleep(600)
    yield
sample_write.decode_frames = frames
signal.signal(signal.SIGTERM, entry.interrupt)
entry.leave(base.main(sys.argv[1:3]))
"""


@pytest.fixture
def workers(config: Path, tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Two processes of one run that deal out four samples, each on its way into the decoding."""
    request = {
        "config": str(config),
        "output": str(tmp_path / "out"),
        "prompts": [{"prompt": "a cat", "seed": seed} for seed in range(4)],
        "set": ["distributed.engine='deepspeed'", "distributed.num_processes=2"],
    }
    (tmp_path / "request.json").write_text(json.dumps(request), encoding="utf-8")
    running = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, "sample", "request.json", f"decoding{rank}"],
            cwd=tmp_path,
            env={**os.environ, **worker_environment(rank, 2, tmp_path / "store")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    yield running
    for process in running:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_sigterm_to_a_whole_group_keeps_what_is_drawn(
    workers: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    deadline = time.monotonic() + 300
    while not all((tmp_path / f"decoding{rank}").exists() for rank in range(2)):
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in workers), workers[0].communicate()
        time.sleep(0.1)
    for process in workers:
        process.terminate()
    said = [process.communicate(timeout=100) for process in workers]
    assert [process.returncode for process in workers] == [130, 130], said
    kept = sorted((tmp_path / "out").iterdir())
    assert [path.name for path in kept] == [f"cats_0{i}_{i}.safetensors" for i in range(4)]
    assert [read_latents(path).metadata["seed"] for path in kept] == [0, 1, 2, 3]
    warned = [json.loads(line) for line in said[0][0].splitlines() if '"warning"' in line]
    words = " ".join(event["message"] for event in warned)
    assert all(path.name in words for path in kept), said
