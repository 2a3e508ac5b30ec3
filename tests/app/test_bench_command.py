"""`menma bench`: what it starts for which arguments, and what it prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from app.cli.commands import bench
from app.render import benchmarks
from trainer.contract.jobs import REQUESTS, BenchConfigRequest, BenchGridRequest

RESULT = {
    "name": "fish", "variant": "wan2.1-t2v-14b", "clip": "832x480x81", "batch": 1,
    "tokens": 32760, "text_tokens": 512, "settings": {}, "device": "NVIDIA H200",
    "torch": "2.13.0", "engine": "deepspeed", "world_size": 1,
    "step_s": {"median": 12.5, "min": 12.25, "max": 13.0, "steps": 3}, "warmup_s": [20.0],
    "loss": 1.0,
    "memory_gib": {"peak_reserved": 50.0, "peak_allocated": 48.0, "peak_host": 4.0},
    "tflop": {"forward": 1688.0, "needed": 4280.0, "computed": 6372.0},
    "tflop_per_s": 342.4, "mfu": 0.3462,
    "estimate": {"gpu": "H200", "step_s": 11.25, "peak_gib": 49.0, "context_gib": 0.55},
    "error_percent": {"step_s": -10.0, "peak": -2.0},
}  # fmt: skip
ON_CPU = {
    **RESULT,
    "device": "cpu",
    "memory_gib": {"peak_reserved": None, "peak_allocated": None, "peak_host": 4.0},
    "mfu": None,
    "estimate": {"gpu": None, "step_s": None, "peak_gib": 49.0, "context_gib": 0.55},
    "error_percent": {"step_s": None, "peak": None},
}


def recorded():
    """Return the last job and its request."""
    content = json.loads(Path("request.json").read_text(encoding="utf-8"))
    return content["job"], REQUESTS[content["job"]].model_validate(content["request"])


@pytest.fixture
def answering(monkeypatch):
    """Return what sets the events that the stand-in trainer sends."""
    return lambda *events: monkeypatch.setenv("FAKE_EVENTS", json.dumps(events))


def ended(result):
    return {"type": "end", "reason": "done", **result}


def row(settings, result, *, status="measured", reason=""):
    return {
        "type": "output", "model": "wan2.1-t2v-14b", "clip": "832x480x81", "settings": settings,
        "status": status, "reason": reason, "result": result,
    }  # fmt: skip


def test_defaults_are_those_of_the_jobs():
    for request in (BenchConfigRequest, BenchGridRequest):
        fields = request.model_fields
        assert fields["steps"].default == bench.STEPS
        assert fields["warmup_steps"].default == bench.WARMUP_STEPS


def test_a_config_is_measured_and_names_stay_names(menma, config, answering):
    answering(ended(RESULT))
    assert menma("bench", config, "--set", "training.seed=7", "--steps", "5").code == 0
    job, request = recorded()
    assert job == "bench_config"
    assert (request.config, request.set) == (config, ("training.seed=7",))
    assert (request.steps, request.warmup_steps) == (5, 1)
    answering()
    menma("bench", "step")
    assert recorded()[0] == "bench"


def test_a_config_needs_no_ending_if_it_is_there(menma, config, answering):
    answering(ended(RESULT))
    config.rename("fish")
    assert menma("bench", "fish", "--warmup-steps", "0").code == 0
    assert recorded()[1].warmup_steps == 0


def test_the_table_is_data_and_the_rest_words(menma, config, answering):
    answering(ended(RESULT))
    answer = menma("bench", config)
    lines = [line.split("  ") for line in answer.out.splitlines()]
    cells = {parts[0] or parts[1]: [p.strip() for p in parts[1:] if p.strip()] for parts in lines}
    assert cells["step, s"] == ["12.50", "11.25", "-10.0 %"]
    assert cells["peak VRAM reserved, GiB"] == ["50.00", "49.00", "-2.0 %"]
    assert cells["MFU"] == ["34.6 %"]
    assert "random weights, deepspeed engine, NVIDIA H200" in answer.err


def test_what_a_cpu_does_not_have_is_a_dash_and_null(menma, config, answering):
    answering(ended(ON_CPU))
    answer = menma("bench", config)
    (line,) = [line for line in answer.out.splitlines() if line.startswith("peak VRAM reserved")]
    assert line.split()[4:] == ["-", "49.00", "-"]
    assert "no VRAM to measure" in answer.err
    found = json.loads(menma("bench", config, "--json").out)
    assert found == ON_CPU
    assert found["memory_gib"]["peak_reserved"] is None


def test_a_grid_becomes_a_markdown_table(menma, answering):
    answering(
        row("bf16", RESULT),
        row("bf16, keep_attention", None, status="skipped", reason="takes 90 GiB, the GPU has 80"),
        ended({"device": "NVIDIA H200", "torch": "2.13.0"}),
    )
    answer = menma("bench", "--grid", "--only", "14b", "--only", "5b", "--steps", "4")
    assert answer.code == 0
    job, request = recorded()
    assert job == "bench_grid"
    assert (request.only, request.steps) == (("14b", "5b"), 4)
    head, empty, *table = answer.out.splitlines()
    assert head.startswith('`menma bench --grid --only "14b" --only "5b"` on NVIDIA H200, torch 2')
    assert empty == ""
    assert len({line.count("|") for line in table}) == 1
    start = "| wan2.1-t2v-14b | 832x480x81 |"
    assert table[2] == f"{start} bf16 | 12.50 | 34.6 % | 50.00 | 49.00 | -2.0 % |"
    assert table[3].startswith(f"{start} bf16, keep_attention | skipped: takes 90 GiB")


def test_rows_of_a_grid_that_fails_are_printed_all_the_same(menma, answering, monkeypatch):
    answering(row("bf16", None, status="failed", reason="out | of memory"), row("fp8", RESULT))
    monkeypatch.setenv("FAKE_CODE", "1")
    answer = menma("bench", "--grid")
    assert answer.code == 1
    assert "failed: out / of memory" in answer.out
    found = menma("bench", "--grid", "--json")
    assert found.code == 1
    assert [one["status"] for one in json.loads(found.out)["rows"]] == ["failed", "measured"]


def test_a_grid_of_a_cpu_says_that_it_measures_no_model():
    lines = benchmarks.markdown([row("bf16", ON_CPU)], device="cpu", torch="2", command="x")
    assert "nothing here says how fast a model is" in lines[1]
    assert lines[-1].endswith("| 12.50 | - | - | 49.00 | - |")


def test_a_grid_of_sampling_tells_what_swapping_costs(menma, answering):
    result = {**RESULT, "video_s": 625.0, "video_steps": 50}
    answering(
        {**row("bf16", result), "slower_percent": None},
        {**row("bf16, blocks_to_swap=40", result), "slower_percent": 4.0},
        {**row("fp8", None, status="failed", reason="no"), "slower_percent": None},
    )
    answer = menma("bench", "--grid", "--sampling")
    job, request = recorded()
    assert (job, request.sampling) == ("bench_grid", True)
    head, _, *table = answer.out.splitlines()
    assert head.startswith("`menma bench --grid --sampling` on ")
    assert len({line.count("|") for line in table}) == 1
    start = "| wan2.1-t2v-14b | 832x480x81 |"
    rest = "34.6 % | 50.00 | 49.00 | -2.0 % |"
    assert table[2] == f"{start} bf16 | 12.50 | 625.00 (50 steps) | - | {rest}"
    swap = f"{start} bf16, blocks_to_swap=40 | 12.50 | 625.00 (50 steps) | +4.0 % | {rest}"
    assert table[3] == swap
    assert [one["slower_percent"] for one in rows_of(menma)] == [None, 4.0, None]


def rows_of(menma):
    return json.loads(menma("bench", "--grid", "--sampling", "--json").out)["rows"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["none.toml"], "config file not found: none.toml"),
        (["{config}", "--set", "training.nonsense=1"], "training.nonsense"),
        (["{config}", "step"], "further names or configs cannot go with a config"),
        (["step", "{config}"], "further names or configs"),
        (["{config}", "--only", "swap"], "--only cannot go with a config"),
        (["step", "--set", "training.seed=1"], "--set cannot go with benchmarks by name"),
        (["step", "--json"], "--json cannot go with"),
        (["--steps", "3"], "--steps cannot go with"),
        (["step", "--warmup-steps", "0"], "--warmup-steps cannot go with"),
        (["{config}", "--sampling"], "--sampling cannot go with a config"),
        (["step", "--sampling"], "--sampling cannot go with benchmarks by name"),
        (["--grid", "step"], "names or a config cannot go with --grid"),
        (["--grid", "--set", "training.seed=1"], "--set cannot go with --grid"),
    ],
)
def test_what_has_no_meaning_is_refused(menma, config, arguments, said):
    words = [word.replace("{config}", str(config)) for word in arguments]
    answer = menma("bench", *words)
    assert (answer.code, answer.out) == (2, "")
    assert said in answer.err
    assert not Path("request.json").exists()
