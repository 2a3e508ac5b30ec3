"""`menma estimate`: what it prints, for which GPU, and what earlier runs change."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from app.domain import cards
from trainer.contract.config_io import load_config
from trainer.contract.memory_model import estimate

GIB = 2**30
FOURTEEN = 'model.variant="wan2.1-t2v-14b"'


def listed(name, vram_gib):
    """Return what `nvidia-smi` would say of a GPU."""
    return {"index": 0, "name": name, "vram_gib": vram_gib, "vram_free_gib": vram_gib}


@pytest.fixture
def sized(config):
    """Return a config with clips of a known size."""
    text = config.read_text(encoding="utf-8")
    added = 'video_directory = "clips"\nresolution = [832, 480]\ntarget_frames = [1, 81]\n'
    config.write_text(text.replace('video_directory = "clips"\n', added), encoding="utf-8")
    return config


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """Hide the GPUs of the machine that the tests run on."""
    monkeypatch.setattr(cards, "gpus", list)


def test_the_table_goes_to_stdout_and_the_words_to_stderr(menma, sized):
    answer = menma("estimate", sized, "--gpu", "4090")
    assert answer.code == 0
    lines = answer.out.splitlines()
    assert lines[0].split() == ["PHASE", "PART", "GIB"]
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == [
        "PHASE",
        "captions",
        "latents",
        "training",
        "sampling",
    ]
    assert "832x480x81" in answer.err
    assert "RTX 4090 has 23.6 GiB: it fits." in answer.err
    assert "±" in answer.err
    assert "An update takes about" in answer.err
    assert not Path("request.json").exists()  # no trainer was started


def test_json_is_the_estimate(menma, sized):
    answer = menma("estimate", sized, "--vram", "24", "--json", "--set", "adapter.rank=64")
    found = json.loads(answer.out)
    expected = estimate(load_config(sized, ["adapter.rank=64"]))
    assert found["peak_gib"] == pytest.approx(expected.peak_bytes / GIB, abs=0.001)
    assert (found["gpu_gib"], found["verdict"], found["step_seconds"]) == (24, "fits", None)
    training = found["phases"]["training"]
    assert sum(training["parts_gib"].values()) == pytest.approx(training["peak_gib"], abs=0.01)
    assert found["margin_gib"] > 0


def test_without_a_gpu_one_has_to_be_named(menma, sized):
    answer = menma("estimate", sized)
    assert answer.code == 2
    assert "--vram 24" in answer.err
    both = menma("estimate", sized, "--gpu", "4090", "--vram", "24")
    assert (both.code, "give --gpu or --vram" in both.err) == (2, True)
    unknown = menma("estimate", sized, "--gpu", "RTX 4091")
    assert (unknown.code, "did you mean" in unknown.err) == (2, True)


def test_the_smallest_gpu_of_this_machine_counts(menma, sized, monkeypatch):
    found = [listed("NVIDIA H200", 139.8), listed("NVIDIA GeForce RTX 3060", 11.8)]
    monkeypatch.setattr(cards, "gpus", lambda: found)
    answer = menma("estimate", sized, "--json")
    result = json.loads(answer.out)
    assert (result["gpu"], result["world_size"]) == ("NVIDIA GeForce RTX 3060", 2)
    assert result["step_seconds"] > 0


def test_a_config_that_is_wrong_is_refused(menma, sized):
    answer = menma("estimate", sized, "--gpu", "4090", "--set", "memory.blocs=3")
    assert (answer.code, "unknown key" in answer.err) == (2, True)


def test_fit_prints_options_that_do_what_they_say(menma, sized):
    words = ["estimate", sized, "--gpu", "L40S", "--set", FOURTEEN]
    assert json.loads(menma(*words, "--json").out)["verdict"] == "does not fit"
    answer = menma(*words, "--fit")
    assert answer.code == 0
    (use,) = [line for line in answer.err.splitlines() if line.startswith("Use: ")]
    options = shlex.split(use.removeprefix("Use: "))
    assert options[::2] == ["--set"] * (len(options) // 2)
    again = json.loads(menma(*words, *options, "--json").out)
    assert again["verdict"] == "fits"
    found = json.loads(menma(*words, "--fit", "--json").out)
    assert found["found"] is True
    assert [change["set"] for change in found["changes"]] == options[1::2]
    assert found["after"]["peak_gib"] == again["peak_gib"]
    assert found["changes"][-1]["peak_gib"] == again["peak_gib"]


def test_fit_says_when_there_is_nothing_to_find(menma, sized):
    answer = menma("estimate", sized, "--vram", "4", "--fit")
    assert answer.code == 1
    assert "No settings fit" in answer.err


def write_run(folder, sized, *, factor, overrides=()):
    """Write what a run leaves behind: its config, and a peak of `factor` times the estimate."""
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(sized.read_text(encoding="utf-8"), encoding="utf-8")
    training = estimate(load_config(sized, overrides)).phase("training")
    size = factor * (training.peak_bytes - training.parts["CUDA context"]) / GIB
    (folder / "peaks.json").write_text(json.dumps({"peak_vram_gib": size}), encoding="utf-8")


def test_measured_peaks_of_this_machine_correct_the_estimate(menma, sized, monkeypatch):
    write_run(Path("runs/one"), sized, factor=1.02)
    write_run(Path("runs/two"), sized, factor=1.08)
    write_run(Path("runs/three"), sized, factor=1.10)
    write_run(Path("runs/odd"), sized, factor=3.0)  # something else used the memory
    Path("runs/broken").mkdir()
    Path("runs/broken/peaks.json").write_text("{", encoding="utf-8")
    here = [listed("NVIDIA GeForce RTX 4090", 23.6)]
    monkeypatch.setattr(cards, "gpus", lambda: here)
    words = ["estimate", sized, "--json"]
    corrected = json.loads(menma(*words).out)
    elsewhere = json.loads(menma(*words, "--gpu", "4090").out)
    assert (corrected["measured_runs"], corrected["correction"]) == (3, 1.08)
    assert (elsewhere["measured_runs"], elsewhere["correction"]) == (0, 1.0)
    before, after = (found["phases"]["training"] for found in (elsewhere, corrected))
    context = before["parts_gib"]["CUDA context"]
    assert after["peak_gib"] - context == pytest.approx(
        1.08 * (before["peak_gib"] - context), 0.001
    )
    other = json.loads(menma(*words, "--set", FOURTEEN).out)
    assert other["measured_runs"] == 0
    assert "x 1.08" in menma("estimate", sized).err


def test_check_says_whether_this_machine_s_gpu_is_large_enough(menma, sized, monkeypatch):
    end = {"type": "end", "reason": "done", "variant": "wan2.1-t2v-14b", "clips": 3}
    monkeypatch.setenv("FAKE_EVENTS", json.dumps([end]))
    assert "GiB" not in menma("check", sized).err
    monkeypatch.setattr(cards, "gpus", lambda: [listed("NVIDIA GeForce RTX 4090", 23.6)])
    answer = menma("check", sized)
    assert answer.code == 0
    assert "it does not fit" in answer.err
    assert "--fit" in answer.err


AUTO = [
    "--set",
    "memory.blocks_to_swap=auto",
    "--set",
    "memory.gradient_checkpointing=auto",
]


def test_auto_is_shown_as_what_it_becomes_on_that_card(menma, sized):
    words = ["estimate", sized, "--set", FOURTEEN, *AUTO]
    large = menma(*words, "--gpu", "H200")
    assert "For H200: memory.blocks_to_swap = auto: 0 of 40, memory.grad" in large.err
    found = json.loads(menma(*words, "--gpu", "L40S", "--json").out)
    became = found["automatic"]
    assert found["verdict"] == "fits"
    assert became["blocks_to_swap"] > 0
    given = [f"memory.{field}={json.dumps(value)}" for field, value in became.items()]
    options = [part for text in given for part in ("--set", text)]
    plain = json.loads(
        menma("estimate", sized, "--set", FOURTEEN, "--gpu", "L40S", "--json", *options).out
    )
    assert (plain["peak_gib"], plain["automatic"]) == (found["peak_gib"], {})
    short = menma(*words, "--vram", "6")
    assert "it does not fit" in short.err
    assert "--fit" in short.err
    assert menma(*words).code == 2  # no GPU here, and none is named


def test_fit_says_what_each_change_costs(menma, sized):
    full = ["adapter.kind=none", "distributed.zero_stage=2", "output.layout=comfy"]
    options = [part for text in full for part in ("--set", text)]
    words = ["estimate", sized, "--gpu", "H100 80GB", "--fit", "--set", FOURTEEN, *options]
    answer = menma(*words)
    assert answer.code == 0
    (line,) = [line for line in answer.err.splitlines() if "offload_optimizer" in line][:1]
    assert "GiB" in line
    assert "an update" in line
    assert "RAM" in line
    assert "--set 'distributed.offload_optimizer=\"cpu\"'" in answer.err
    text = sized.read_text(encoding="utf-8").replace("[1, 81]", "[1]")
    sized.write_text(text, encoding="utf-8")  # of images, swapping takes longer than fp8
    images = menma("estimate", sized, "--gpu", "RTX 4090", "--fit", "--set", FOURTEEN)
    assert "less exact" in images.err


def test_a_run_with_auto_counts_as_what_it_became(menma, sized, monkeypatch):
    became = {"blocks_to_swap": 12, "gradient_checkpointing": 2}
    values = [f"memory.{field}={value}" for field, value in became.items()]
    for name in ("told", "silent"):
        write_run(Path("runs") / name, sized, factor=1.06, overrides=values)
        text = sized.read_text(encoding="utf-8").replace("[memory]", "")
        text += "\n[memory]\n" + "".join(f'{field} = "auto"\n' for field in became)
        (Path("runs") / name / "config.toml").write_text(text, encoding="utf-8")
    record = json.dumps({"world_size": 1, "memory": became})
    Path("runs/told/environment.json").write_text(record, encoding="utf-8")
    monkeypatch.setattr(cards, "gpus", lambda: [listed("NVIDIA GeForce RTX 4090", 23.6)])
    found = json.loads(menma("estimate", sized, "--json").out)
    assert (found["measured_runs"], found["correction"]) == (1, 1.06)


def test_check_says_what_auto_becomes(menma, sized, monkeypatch):
    end = {"type": "end", "reason": "done", "variant": "wan2.1-t2v-14b", "clips": 3}
    monkeypatch.setenv("FAKE_EVENTS", json.dumps([end]))
    monkeypatch.setattr(cards, "gpus", lambda: [listed("NVIDIA L40S", 44.7)])
    answer = menma("check", sized, *AUTO)
    assert answer.code == 0
    assert "For NVIDIA L40S: memory.blocks_to_swap = auto: " in answer.err
    assert "it fits" in answer.err


def test_other_jobs_are_told_with_their_ram_and_time(menma, sized):
    text = sized.read_text(encoding="utf-8") + '\n[[sampling.prompts]]\nprompt = "a fish"\n'
    sized.write_text(text, encoding="utf-8")
    options = ["--set", FOURTEEN, "--set", "sampling.every_steps=500", "--ram", "4"]
    answer = menma("estimate", sized, "--gpu", "H200", *options)
    assert answer.code == 0
    words = answer.err
    assert "Caching a clip of 832x480x81 takes about" in words
    assert "`menma sample` takes about" in words
    assert "100 passes" in words
    assert "Samples of the run take about" in words
    for job in ("training", "caching", "sampling"):
        assert f"Host memory while {job}: " in words
    assert "RAM: 4.0 GiB; " in words
    assert "it does not fit." in words
    found = json.loads(menma("estimate", sized, "--gpu", "H200", "--json", *options).out)
    assert set(found["jobs"]) == {"caching", "sampling", "samples"}
    assert found["host"]["verdict"] == "does not fit"
    assert found["jobs"]["sampling"]["total_seconds"] > 10
    unknown = menma("estimate", sized, "--vram", "24")
    assert ("takes about" in unknown.err, "Host memory while caching" in unknown.err) == (
        False,
        True,
    )


def test_check_says_how_long_caching_takes(menma, sized, monkeypatch):
    rows = [{"bucket": "832x480x81", "items": 1000, "tokens": 32760}]
    end = {
        "type": "end",
        "reason": "done",
        "variant": "wan2.1-t2v-14b",
        "clips": 1000,
        "buckets": rows,
        "num_buckets": 1,
    }
    monkeypatch.setenv("FAKE_EVENTS", json.dumps([end]))
    assert "Caching" not in menma("check", sized).err
    monkeypatch.setattr(cards, "gpus", lambda: [listed("NVIDIA H200", 139.8)])
    answer = menma("check", sized)
    assert "Caching all training clips takes about 1" in answer.err
    monkeypatch.setenv("FAKE_EVENTS", json.dumps([{**end, "num_buckets": 2}]))
    assert "Caching" not in menma("check", sized).err


def test_sample_says_how_long_it_takes(menma, sized, monkeypatch):
    words = ["sample", sized, "--set", FOURTEEN, "--steps", "10", "-p", "a fish"]
    assert "By the estimate" not in menma(*words).err  # no GPU here
    monkeypatch.setattr(cards, "gpus", lambda: [listed("NVIDIA H200", 139.8)])
    found = []
    for more in ([], ["-p", "another", "--set", "memory.blocks_to_swap=auto"]):
        match = re.search(r"this takes about (\d+) s on NVIDIA H200\.", menma(*words, *more).err)
        found.append(int(match[1]))
    one = 20 * 2.43 + 1.4  # passes of 2.43 s, and the decoding
    assert found[0] == pytest.approx(one, rel=0.1)
    assert found[1] - found[0] == pytest.approx(one, rel=0.1)
    for quiet in (["--set", "distributed.device=cpu"], ["--set", "model.variant=auto"]):
        assert "By the estimate" not in menma(*words, *quiet).err
    Path("many.txt").write_text("a fish\n", encoding="utf-8")
    assert "By the estimate" not in menma("sample", sized, "--prompts-file", "many.txt").err
