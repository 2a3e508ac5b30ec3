"""The benchmarks run and say what they measured; limits are for quiet machines, not for tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.bench.engine_turns import SMALL_GRID, SMALL_MODEL
from tests.warm import start as warm
from trainer.bench import job, load, load_fp8, load_fp8_14b, sample, step
from trainer.bench.result import Measurement, timed_in_turns
from trainer.contract.errors import ConfigError, RunError
from trainer.contract.jobs import BenchRequest
from trainer.contract.variants import VARIANTS, TransformerConfig

ROOT = Path(__file__).parents[2]


class Events:
    """Takes events."""

    def __init__(self):
        self.all = []

    def __call__(self, kind, /, **fields):
        self.all.append({"type": kind, **fields})

    def of(self, kind):
        return [event for event in self.all if event["type"] == kind]


def test_steps_are_timed_in_turns():
    calls = []
    times = timed_in_turns(lambda: calls.append("a"), lambda: calls.append("b"), 4)
    assert "".join(calls) == "baabbaab"
    assert len(times) == 4


def test_a_measurement_knows_its_limit():
    values = {"name": "x", "what": "x", "unit": "ratio", "limit": 1.0}
    assert Measurement(value=1.0, **values).fine
    assert not Measurement(value=1.01, **values).fine


@pytest.fixture
def small(monkeypatch):
    """Make what is measured small: whether both sides do the same is asked here, not how fast."""
    for module in (step, sample):
        monkeypatch.setattr(module, "CONFIG", SMALL_MODEL)
        monkeypatch.setattr(module, "GRID", SMALL_GRID)


@pytest.mark.slow
def test_the_step_does_the_same_as_the_reference(small):
    found = step.measure(pairs=1)
    assert found.figures["gradient_difference"] < 1e-3
    assert 0.1 < found.value < 10


@pytest.mark.slow
def test_sampling_makes_the_same_as_the_reference(small):
    found = sample.measure(pairs=1, num_steps=2)
    assert found.figures["latents_difference"] < 1e-3
    assert found.figures["frames_difference"] <= 1
    assert 0.1 < found.value < 10


@pytest.mark.slow
@pytest.mark.parametrize("name", ["local", "deepspeed"])
def test_the_engine_does_the_same_as_the_plain_loop(name):
    if name == "deepspeed":
        pytest.importorskip("deepspeed")
    # DeepSpeed remembers the first process group of a process: other tests must not inherit it.
    command = [sys.executable, "-m", "tests.bench.engine_turns", name]
    done = warm.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "'max_loss_difference': 0.0" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("container", ["safetensors", "pth"])
def test_loading_is_measured_in_a_process_of_its_own(tmp_path, monkeypatch, container):
    from dataclasses import replace

    tiny = TransformerConfig(dim=1536, ffn_dim=1536, num_layers=2)
    small = replace(VARIANTS["wan2.1-t2v-1.3b"], transformer=tiny)
    monkeypatch.setitem(VARIANTS, "small", small)
    found = load.measure(variant="small", folder=tmp_path, container=container)
    assert found.figures["peak_gib"] > found.figures["file_gib"] > 0.1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("stored", ["fp8_scaled", "bf16"])
def test_loading_into_fp8_takes_the_fp8_model_and_a_block(tmp_path, monkeypatch, stored):
    from dataclasses import replace

    tiny = TransformerConfig(dim=1536, ffn_dim=8960, num_layers=6)
    small = replace(VARIANTS["wan2.1-t2v-1.3b"], transformer=tiny)
    monkeypatch.setitem(VARIANTS, "small", small)
    found = load_fp8.measure(variant="small", folder=tmp_path, stored=stored)
    assert found.fine
    assert 0.95 < found.figures["ratio_with_block"] < 1.4
    assert 0.25 < found.figures["model_gib"] < 0.4
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_job_reports_each_figure_with_its_limit():
    events = Events()
    job.run(BenchRequest(names=("help",)), events)
    (found,) = events.of("output")
    assert found["name"] == "help"
    assert found["value"] > found["python_s"] > 0
    assert "menma --help" in events.of("log")[0]["message"]


def test_an_unknown_benchmark_is_refused():
    with pytest.raises(ConfigError, match="hlep"):
        job.run(BenchRequest(names=("hlep",)), Events())


@pytest.mark.parametrize("named", [True, False])
def test_what_is_not_installed_is_said(monkeypatch, named):
    def measure(module):
        raise ImportError("no module", name="diffusers")

    monkeypatch.setattr(job, "_measure", measure)
    events = Events()
    if named:
        with pytest.raises(RunError, match="diffusers"):
            job.run(BenchRequest(names=("step",)), events)
    else:
        job.run(BenchRequest(), events)
        assert "diffusers" in events.of("warning")[0]["message"]
        assert events.of("output") == []


def test_the_large_benchmark_runs_when_it_is_named_only():
    assert "load_fp8_14b" in job.BENCHMARKS.names
    assert set(job.usual()) == set(job.BENCHMARKS.names) - {"load_fp8_14b", "loraid"}


@pytest.mark.parametrize("free", ["disk", "ram"])
def test_the_large_benchmark_looks_for_room_before_it_writes(monkeypatch, tmp_path, free):
    from types import SimpleNamespace

    size = load_fp8_14b.file_bytes("wan2.1-t2v-14b")
    assert 14.2e9 < size < 14.8e9
    plenty = SimpleNamespace(free=10**12, available=10**12)
    little = SimpleNamespace(free=size, available=size)
    disk, ram = (little, plenty) if free == "disk" else (plenty, little)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: disk)
    monkeypatch.setattr("psutil.virtual_memory", lambda: ram)
    with pytest.raises(RunError, match="file takes" if free == "disk" else "of RAM"):
        load_fp8_14b.measure(folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_size_of_the_file_is_known_before_it_is_written(monkeypatch, tmp_path):
    from dataclasses import replace

    tiny = TransformerConfig(dim=48, ffn_dim=96, num_heads=2, num_layers=2, text_dim=16)
    small = replace(VARIANTS["wan2.1-t2v-1.3b"], transformer=tiny)
    monkeypatch.setitem(VARIANTS, "small", small)
    path = tmp_path / "model.safetensors"
    load.write_random_model(path, "small", fp8=True)
    header = int.from_bytes(path.read_bytes()[:8], "little") + 8
    assert load_fp8_14b.file_bytes("small") + 2 == path.stat().st_size - header


def test_a_file_in_memory_needs_room_twice(monkeypatch, tmp_path):
    from types import SimpleNamespace

    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=10**12))
    there = SimpleNamespace(available=int(2e9))
    monkeypatch.setattr("psutil.virtual_memory", lambda: there)
    load_fp8_14b.check_room(10**9, tmp_path)
    monkeypatch.setattr(load_fp8_14b, "_file_system", lambda folder: "tmpfs")
    with pytest.raises(RunError, match="of RAM"):
        load_fp8_14b.check_room(10**9, tmp_path)
