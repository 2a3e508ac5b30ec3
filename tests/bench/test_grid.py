"""`bench_grid`: the rows, which of them fit, and what a row that fails does to the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tomlkit

from trainer.bench import grid
from trainer.bench.grid_rows import (
    RANK,
    Row,
    cpu_rows,
    gpu_rows,
    sampling_rows,
    tiny_sampling_rows,
)
from trainer.contract.config_io import load_config
from trainer.contract.errors import ConfigError, RunError
from trainer.contract.jobs import BenchGridRequest
from trainer.contract.memory_model import estimate, find_gpu, gpu_of_memory
from trainer.contract.variants import VARIANTS

TINY = cpu_rows()


class Events:
    """Takes events."""

    def __init__(self):
        self.all = []

    def __call__(self, kind, /, **fields):
        self.all.append({"type": kind, **fields})

    def of(self, kind):
        return [event for event in self.all if event["type"] == kind]


@pytest.fixture
def jobs(monkeypatch):
    """Replace the rows' processes by functions; return the configs that they were given."""
    configs = []

    def use(job: Callable[..., dict[str, Any]]):
        def run_job(name, request, file, emit):
            assert name == "bench_config"
            config = load_config(request.config)
            configs.append(config)
            return job(config, request, emit)

        monkeypatch.setattr(grid, "run_job", run_job)
        return configs

    return use


def measured(config, request, emit):
    emit("phase", name="measure", detail="steps")
    emit("end", reason="done")
    return {"reason": "done", "steps": request.steps}


@pytest.mark.parametrize(
    "row", gpu_rows() + TINY + sampling_rows() + tiny_sampling_rows(), ids=lambda row: row.name
)
def test_each_row_is_a_config_of_its_clip(tmp_path, row):
    path = tmp_path / "row.toml"
    path.write_text(tomlkit.dumps(row.config()), encoding="utf-8")
    found = estimate(load_config(path), find_gpu("H200"))
    assert (found.variant, str(found.clip)) == (row.variant, row.clip)
    assert found.world_size == 1
    assert load_config(path).adapter.options("kind")["rank"] == RANK


def test_rows_have_names_of_their_own_and_the_large_model_each_way_to_save_memory():
    for rows in (gpu_rows(), TINY):
        assert len({row.name for row in rows}) == len(rows)
    ways = {row.settings for row in gpu_rows() if row.variant == "wan2.1-t2v-14b"}
    assert ways == {
        "bf16",
        "bf16, blocks_to_swap=40",
        "bf16, blocks_to_swap=40, feed_forward_chunks=4, attention_chunks=4",
        "fp8_scaled, feed_forward_chunks=4, attention_chunks=4",
        "fp8_scaled",
        "fp8_scaled, fp8_matmul",
        "fp8_scaled, blocks_to_swap=40",
        "bf16, keep_attention",
        "bf16, feed_forward_chunks=4",
        "bf16, compile_blocks",
    }
    assert all(row.shape and row.model.startswith("tiny") for row in TINY)
    assert not any(row.shape for row in gpu_rows())
    assert {row.variant for row in gpu_rows()} <= set(VARIANTS)


def test_a_row_that_does_not_fit_is_skipped_with_the_figures(tmp_path, jobs):
    configs = jobs(measured)
    large = Row(variant="wan2.1-t2v-14b", width=832, height=480)
    for memory_gib, status in ((24, "skipped"), (140, "measured")):
        card = gpu_of_memory(memory_gib)
        found = grid.measure_row(large, card, BenchGridRequest(), tmp_path, Events())
        assert found["status"] == status
    assert len(configs) == 1
    reason = grid.too_large(tmp_path / "config.toml", gpu_of_memory(24))
    assert reason.endswith("GiB, the GPU has 24.0")


def test_a_row_that_takes_more_ram_than_there_is_is_skipped(tmp_path, monkeypatch):
    row = Row(variant="wan2.1-t2v-14b", width=480, height=480, memory={"blocks_to_swap": 40})
    path = tmp_path / "row.toml"
    path.write_text(tomlkit.dumps(row.config()), encoding="utf-8")
    total = type("Memory", (), {"total": 16 * 2**30})
    monkeypatch.setattr("psutil.virtual_memory", lambda: total)
    assert "of RAM, there are 16.0" in grid.too_large(path, find_gpu("RTX 4090"))
    total.total = 64 * 2**30
    assert grid.too_large(path, find_gpu("RTX 4090")) is None


def test_a_row_that_fails_tells_why_and_the_next_ones_run(jobs, monkeypatch):
    def fail_once(config, request, emit):
        if len(configs) == 1:
            emit("error", message="out of memory: tried to allocate 3 GiB", hint="less", code=1)
            raise RunError("the job bench_config failed (exit code 1)")
        if len(configs) == 2:
            raise RunError("the job bench_config failed (exit code -11)")
        return measured(config, request, emit)

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    configs = jobs(fail_once)
    events = Events()
    with pytest.raises(RunError, match=f"2 of {len(TINY)} rows failed: {TINY[0].name}; "):
        grid.run(BenchGridRequest(steps=7), events)
    rows = events.of("output")
    assert [row["status"] for row in rows] == ["failed", "failed"] + ["measured"] * 4
    assert rows[0]["reason"] == "out of memory: tried to allocate 3 GiB"
    assert rows[1]["reason"] == "the job bench_config failed (exit code -11)"
    assert rows[0]["result"] is None
    assert rows[2]["result"] == {"steps": 7}
    assert [row["settings"] for row in rows] == [row.settings for row in TINY]
    assert events.of("error") == []
    (end,) = events.of("end")
    assert end["device"] == "cpu"


def test_rows_are_chosen_by_words():
    assert [row.settings for row in grid.chosen(TINY, ["swap"])] == [
        "bf16, blocks_to_swap=3",
        "fp8_scaled, blocks_to_swap=3",
    ]
    assert grid.chosen(TINY, []) == list(TINY)
    with pytest.raises(ConfigError, match="no row of the grid has nonsense or more") as caught:
        grid.chosen(TINY, ["nonsense", "more"])
    assert TINY[0].name in caught.value.hint


@pytest.mark.usefixtures("warm_processes")
@pytest.mark.slow
def test_the_grid_of_a_machine_without_a_gpu_runs(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    events = Events()
    grid.run(BenchGridRequest(only=("fp8_scaled, blocks", "chunks"), steps=1), events)
    rows = events.of("output")
    assert [row["status"] for row in rows] == ["measured"] * 2
    for row in rows:
        assert row["result"]["step_s"]["median"] > 0
        assert row["result"]["memory_gib"]["peak_reserved"] is None
        assert row["result"]["settings"]["adapter.rank"] == RANK


def test_sampling_has_both_models_resident_in_fp8_and_swapped():
    swaps = {"wan2.1-t2v-1.3b": 30, "wan2.1-t2v-14b": 40}
    assert [(row.model, row.clip, row.settings) for row in sampling_rows()] == [
        (model, "832x480x81", f"{weights}{swap}")
        for model, blocks in swaps.items()
        for weights in ("bf16", "fp8_scaled")
        for swap in ("", f", blocks_to_swap={blocks}")
    ]
    assert all(row.model.startswith("tiny") for row in tiny_sampling_rows())


def test_what_swapping_costs_is_told_against_the_same_weights_resident(monkeypatch):
    seconds = iter((10.0, 11.5, 8.0, 8.0))

    def run_job(name, request, file, emit):
        assert name == "bench_sampling"
        return {"reason": "done", "step_s": {"median": next(seconds)}}

    monkeypatch.setattr(grid, "run_job", run_job)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    events = Events()
    grid.run(BenchGridRequest(sampling=True), events)
    assert [row["slower_percent"] for row in events.of("output")] == [None, 15.0, None, 0.0]
    row = tiny_sampling_rows()[1]
    assert grid.slower_than_resident(row, {"step_s": {"median": 1.0}}, {}) is None
    assert grid.slower_than_resident(row, None, {}) is None


def test_sampling_is_judged_by_its_own_peak(tmp_path, jobs):
    path = tmp_path / "row.toml"
    path.write_text(tomlkit.dumps(sampling_rows()[4].config()), encoding="utf-8")
    card = gpu_of_memory(40)
    assert "takes" in grid.too_large(path, card)
    assert grid.too_large(path, card, sampling=True) is None
    assert "takes" in grid.too_large(path, gpu_of_memory(24), sampling=True)
