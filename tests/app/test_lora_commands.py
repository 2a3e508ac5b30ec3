"""`menma lora …` hands over what was typed and shows what the job says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from app.cli.commands import lora_files
from trainer.contract.jobs import REQUESTS

CASES = [
    (
        ["merge", "a.safetensors:0.5", "b.safetensors", "-o", "o.safetensors", "--rank", "8"],
        "lora_merge",
        {"rank": 8, "output": Path("o.safetensors"), "layout": None, "force": False},
    ),
    (
        ["subtract", "a.safetensors", "b.safetensors:2", "-o", "o.safetensors", "--dtype", "fp32"],
        "lora_subtract",
        {"minuend": Path("a.safetensors"), "dtype": "fp32", "energy": None},
    ),
    (
        ["blend", "a.safetensors", "b.safetensors", "-o", "out", "--share", "0.2", "--votes", "1",
         "--group", "self=0.5", "--group", "ffn=0.7"],
        "lora_blend",
        {"share": 0.2, "votes": 1.0, "groups": {"self": 0.5, "ffn": 0.7}, "output": Path("out")},
    ),
    (
        ["ema", "a.safetensors", "b.safetensors", "-o", "o.safetensors", "--sigma-rel", "0.2",
         "--no-sort"],
        "lora_ema",
        {"sigma_rel": 0.2, "sort": False, "exact": False, "beta": None},
    ),
    (
        ["resize", "a.safetensors", "-o", "o.safetensors", "--energy", "0.9", "--expert",
         "low_noise"],
        "lora_resize",
        {"energy": 0.9, "expert": "low_noise", "rank": None},
    ),
    (
        ["extract", "a.safetensors", "b.safetensors", "-o", "o.safetensors", "--rank", "4",
         "--allow-partial", "--device", "cpu"],
        "lora_extract",
        {"rank": 4, "allow_partial": True, "device": "cpu", "tuned": Path("b.safetensors")},
    ),
    (
        ["convert", "a.safetensors", "o.safetensors", "--layout", "peft", "--join",
         "b.safetensors"],
        "convert",
        {"layout": "peft", "join": Path("b.safetensors"), "split": False},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("words", "job", "fields"), CASES, ids=lambda case: str(case)[:20])
def test_every_tool_hands_over_what_was_typed(menma, monkeypatch, words, job, fields):
    for name in "ab":
        Path(f"{name}.safetensors").write_bytes(b"")
    event = {"type": "output", "path": "o.safetensors", "ranks": {"8": 3}, "energy": 0.5}
    monkeypatch.setenv("FAKE_EVENTS", json.dumps([event]))
    answer = menma("lora", *words)
    assert (answer.code, answer.out) == (0, "o.safetensors\n")
    assert "energy kept: 50.00 %" in answer.err
    content = json.loads(Path("request.json").read_text(encoding="utf-8"))
    assert content["job"] == job
    request = REQUESTS[job].model_validate(content["request"])
    assert {name: getattr(request, name) for name in fields} == fields
    if job not in {"convert", "lora_resize"}:
        return
    shown = json.loads(menma("lora", *words, "--json").out)
    wanted = {key: value for key, value in event.items() if key != "type"}
    assert shown == ([wanted] if job == "convert" else wanted)


def test_strengths_and_experts_of_files(menma):
    Path("a.safetensors").write_bytes(b"")
    assert menma("lora", "merge", "a.safetensors:-0.5@low_noise", "-o", "o.safetensors").code == 0
    (use,) = json.loads(Path("request.json").read_text())["request"]["loras"]
    assert use == {"path": "a.safetensors", "strength": -0.5, "expert": "low_noise"}


def test_mistakes_are_seen_before_a_trainer_starts(menma):
    Path("a.safetensors").write_bytes(b"")
    Path("o.safetensors").write_bytes(b"mine")
    answer = menma("lora", "merge", "a.safetensors", "-o", "o.safetensors")
    assert (answer.code, "exists already" in answer.err) == (2, True)
    assert menma("lora", "resize", "a.safetensors", "-o", "o.safetensors", "--rank", "2").code == 2
    answer = menma("lora", "merge", "none.safetensors", "-o", "new.safetensors")
    assert (answer.code, "no such LoRA file: none.safetensors" in answer.err) == (2, True)
    blend = ["a.safetensors", "a.safetensors", "--share", "0.5", "-o", "out"]
    answer = menma("lora", "blend", *blend, "--group", "self")
    assert (answer.code, "--group self=0.5" in answer.err) == (2, True)
    assert not Path("request.json").exists()


def test_merge_takes_both_experts(menma):
    Path("a.safetensors").write_bytes(b"")
    words = ["--base", "low", "--base-high-noise", "high", "--lora", "a.safetensors"]
    assert menma("merge", *words, "-o", "o.safetensors").code == 0
    request = json.loads(Path("request.json").read_text())["request"]
    assert (request["base"], request["base_high_noise"]) == ("low", "high")


def test_inspect_lays_out_both_experts(menma, monkeypatch):
    part = {
        "kind": "lora",
        "norm": 2.0,
        "norm_by_block": {"0": 1.0, "other": 0.5},
        "programs": {"ComfyUI": {"loads": True}, "diffusers": {"loads": False, "why": "no"}},
    }
    summary = {"path": "a", "layout": "comfy", "pair": {"high_noise": part, "low_noise": part}}
    event = {"type": "output", "path": "a", "lora": summary}
    monkeypatch.setenv("FAKE_EVENTS", json.dumps([event]))
    lines = menma("lora", "inspect", "a.safetensors").out.splitlines()
    assert lines.count("by block    0: 1  other: 0.5") == 2
    assert lines.index("high_noise") < lines.index("low_noise")
    assert "ComfyUI      loads it" in lines
    assert "diffusers    no" in lines


def test_a_rounding_is_shown(menma, monkeypatch):
    rounding = {"update_error": 0.61, "weight_error": 0.02, "worst": {}}
    event = {"type": "output", "path": "o.safetensors", "rounding": rounding}
    monkeypatch.setenv("FAKE_EVENTS", json.dumps([event]))
    Path("a.safetensors").write_bytes(b"")
    words = ["--base", "low", "--lora", "a.safetensors", "-o", "o.safetensors"]
    assert "rounding: 61 % of what was added, 2 % of the weights" in menma("merge", *words).err


def test_inspect_lists_whole_differences() -> None:
    names = {"head.head.diff": 1, "norm3.diff": 40, "norm3.diff_b": 40, "q.diff_b": 40, "z.diff": 1}
    part = {"differences": {"num": 122, "num_zero": 80, "norm": 0.25, "names": names}}
    lines = lora_files._part_lines(part)
    assert lines == [
        "differences 122 whole, 80 of them zero, norm 0.25",
        "            head.head.diff (1), norm3.diff (40), norm3.diff_b (40), q.diff_b (40)",
        "            z.diff (1)",
    ]
    assert not any("difference" in line for line in lora_files._part_lines({"differences": {}}))
