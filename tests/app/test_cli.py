"""Commands as a script or a person meets them: exit codes, stdout, stderr."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from app_runs import ENVIRONMENT

from app.catalog import COMMANDS
from app.cli.jobs import JobResult
from trainer.contract.config_io import load_config
from trainer.contract.jobs import REQUESTS

GROUPS = {
    "presets": ["list", "show", "diff", "save", "remove"],
    "config": ["show", "deepspeed"],
    "lora": ["inspect", "convert", "merge", "subtract", "blend", "ema", "resize", "extract"],
    "runs": ["list", "show", "compare", "watch", "stop", "save", "sample"],
}
EVERY_COMMAND = [[name] for name in COMMANDS] + [
    [group, name] for group, names in GROUPS.items() for name in names
]


def recorded(job):
    """Return the last request that the stand-in trainer got, as the trainer reads it."""
    content = json.loads(Path("request.json").read_text(encoding="utf-8"))
    assert content["job"] == job
    return REQUESTS[job].model_validate(content["request"])


def test_menma_alone_prints_help(menma):
    answer = menma()
    assert answer.code == 0
    assert all(name in answer.out for name in COMMANDS)


@pytest.mark.parametrize("words", EVERY_COMMAND, ids=" ".join)
def test_help_fits_a_terminal_of_80_columns(menma, words):
    answer = menma(*words, "--help")
    assert answer.code == 0
    assert answer.out.startswith(f"Usage: menma {' '.join(words)}")
    assert max(map(len, answer.out.splitlines())) <= 80


def test_version(menma):
    assert menma("version").out.startswith("menma ")
    assert menma("--version").out == menma("version").out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], "Did you mean 'train'?"),
        (["train"], "Missing argument"),
        (["train", "none.toml"], "config file not found: none.toml"),
        (["runs", "show", "none"], "no such run: none"),
        (["presets", "show", "wan2.1-t2v-1.3-lora"], "did you mean 'wan2.1-t2v-1.3b-lora'?"),
        (["config", "show", "none.toml"], "menma new"),
        (["merge", "-o", "x.safetensors"], "--base FILE is missing"),
        (["merge", "-o", "x", "--base", "b", "--lora", "no.safetensors:0.5"], "no such LoRA file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_end_with_2_and_say_what_to_do_on_stderr(menma, arguments, said):
    answer = menma(*arguments)
    assert answer.code == 2
    assert said in answer.err
    assert answer.out == ""
    assert "Traceback" not in answer.err


def test_all_problems_of_a_config_are_listed_with_file_line_and_nearest_key(menma, config):
    config.write_text(
        '[training]\nmax_stepz = 3\nseed = -1\n[adapter]\nrnak = 4\n[sampling]\nsolver = "eular"\n'
    )
    answer = menma("config", "show", config)
    assert answer.code == 2
    assert "error: 3 problems" in answer.err
    assert f"{config}:2: training.max_stepz: unknown key" in answer.err
    assert "did you mean 'max_steps'?" in answer.err
    assert f"{config}:5: adapter.rnak" in answer.err
    assert "'rank'" in answer.err
    assert f"{config}:3: training.seed" in answer.err


def test_check_json_lists_problems_without_starting_the_trainer(menma, config):
    config.write_text(config.read_text() + "max_stepz = 3\n")
    answer = menma("check", config, "--json")
    assert answer.code == 2
    found = json.loads(answer.out)
    assert found["ok"] is False
    (problem,) = found["problems"]
    assert problem == {
        "message": "unknown key",
        "key": "training.max_stepz",
        "file": str(config),
        "line": 14,
        "hint": "did you mean 'max_steps'?",
    }
    assert not Path("request.json").exists()


def test_check_json_reports_what_the_trainer_found(menma, config, monkeypatch):
    events = [
        {"type": "warning", "message": "a.mp4: too short", "file": "a.mp4"},
        {"type": "end", "reason": "done"},
    ]
    monkeypatch.setenv("FAKE_EVENTS", json.dumps(events))
    answer = menma("check", config, "--json", "--set", "training.seed=7")
    assert answer.code == 0
    found = json.loads(answer.out)
    assert (found["ok"], found["problems"]) == (True, [])
    assert found["warnings"][0]["message"] == "a.mp4: too short"
    assert recorded("check").set == ("training.seed=7",)
    monkeypatch.setenv("FAKE_CODE", "2")
    assert menma("check", config, "--json").code == 2


@pytest.mark.parametrize("code", [0, 1, 2, 3, 130])
def test_the_exit_code_of_a_job_is_passed_on(menma, config, monkeypatch, code):
    monkeypatch.setenv("FAKE_CODE", str(code))
    assert menma("cache", config).code == code
    assert recorded("cache").config == config


def test_cache_removes_nothing_unless_told_to(menma, config, monkeypatch):
    end = {"type": "end", "reason": "done", "unneeded": 2, "unneeded_bytes": 3 << 20}
    monkeypatch.setenv("FAKE_EVENTS", json.dumps([end]))
    answer = menma("cache", config)
    assert "2 entries (3.0 MiB) that this config does not need: kept" in answer.err
    assert f"menma cache {config} --prune" in answer.err
    assert recorded("cache").prune is False
    end = {"type": "end", "reason": "done", "removed": 1, "removed_bytes": 1 << 19}
    monkeypatch.setenv("FAKE_EVENTS", json.dumps([end]))
    answer = menma("cache", config, "--prune")
    assert "1 entry (0.5 MiB) that this config does not need: removed" in answer.err
    assert recorded("cache").prune is True


def test_cache_takes_and_writes_caches_of_musubi_when_told_to(menma, config, monkeypatch):
    end = {"type": "end", "reason": "done", "encoded": 1, "reused": 2, "adopted": 3, "exported": 4}
    monkeypatch.setenv("FAKE_EVENTS", json.dumps([end]))
    answer = menma("cache", config, "--from-musubi", "--write-musubi", "theirs")
    assert "clips: 1 encoded, 2 kept, 3 taken from musubi-tuner" in answer.err
    assert "4 files written in musubi-tuner's format" in answer.err
    assert (recorded("cache").from_musubi, str(recorded("cache").write_musubi)) == (True, "theirs")
    menma("cache", config)
    assert (recorded("cache").from_musubi, recorded("cache").write_musubi) == (False, None)


def test_what_a_job_needs_is_checked_before_it_starts(menma, config):
    Path("vae.safetensors").unlink()
    answer = menma("cache", config)
    assert answer.code == 2
    assert f"{config}:6: model.vae: no such file or folder: vae.safetensors" in answer.err
    assert not Path("request.json").exists()


def test_sample_hands_over_what_was_typed(menma, config, monkeypatch):
    Path("a.safetensors").write_bytes(b"")
    Path("b:1.safetensors").write_bytes(b"")
    monkeypatch.setenv(
        "FAKE_EVENTS", json.dumps([{"type": "sample", "path": "samples/1.mp4", "seed": 5}])
    )
    words = ["--prompt", "a cat", "-p", "a dog", "--negative-prompt", 'say "no" = 1']
    sizes = ["--width", "64", "--height", "32", "--frames", "5", "--steps", "3", "--seed", "5"]
    more = ["--guidance", "1.5", "--shift", "3", "--solver", "euler", "--image", "a.png"]
    loras = ["--lora", "a.safetensors:-0.5@high_noise", "--lora", "b:1.safetensors"]
    answer = menma("sample", config, *words, *sizes, *more, *loras, "-o", "out")
    assert answer.code == 0
    assert answer.out == "samples/1.mp4\n"
    request = recorded("sample")
    assert [prompt.prompt for prompt in request.prompts] == ["a cat", "a dog"]
    assert request.prompts[0].image == Path("a.png")
    sampling = load_config(request.config, request.set).sampling
    assert sampling.negative_prompt == 'say "no" = 1'
    assert (sampling.width, sampling.height, sampling.num_frames) == (64, 32, 5)
    assert (sampling.num_steps, sampling.seed, sampling.solver) == (3, 5, "euler")
    assert (sampling.guidance_scale, sampling.flow_shift) == (1.5, 3.0)
    first, second = request.loras
    assert (str(first.path), first.strength, first.expert) == ("a.safetensors", -0.5, "high_noise")
    assert (str(second.path), second.strength, second.expert) == ("b:1.safetensors", 1.0, None)
    assert request.output == Path("out")
    assert json.loads(menma("sample", config, "-p", "x", "--json").out)[0]["seed"] == 5


def test_sample_hands_over_guidance_and_step_cache(menma, config):
    guidance = ["--cfg-skip", "late", "--cfg-apply-ratio", "0.6", "--cfg-zero-star", "--cfg-batch"]
    more = ["--cfg-zero-init-steps", "2", "--guidance-rescale", "0.5", "--slg-layers", "9,10"]
    slg = ["--slg-scale", "2", "--slg-start", "0.1", "--slg-end", "0.4"]
    cache = ["--step-cache", "teacache", "--step-cache-threshold", "0.1", "--step-cache-retention"]
    limits = ["--step-cache-start", "0.2", "--step-cache-max-skips", "3"]
    words = [*guidance, *more, *slg, *cache, *limits, "--step-cache-file", "m.json"]
    assert menma("sample", config, "-p", "x", *words).code == 0
    request = recorded("sample")
    assert not request.calibrate
    sampling = load_config(request.config, request.set).sampling
    found = sampling.model_dump(exclude_unset=True)
    expected = {
        "cfg_skip_mode": "late",
        "cfg_apply_ratio": 0.6,
        "cfg_zero_star": True,
        "cfg_zero_init_steps": 2,
        "guidance_rescale": 0.5,
        "slg_mode": "original",
        "slg_layers": (9, 10),
        "slg_scale": 2.0,
        "slg_start": 0.1,
        "slg_end": 0.4,
        "cfg_batch": True,
        "step_cache": "teacache",
        "step_cache_threshold": 0.1,
        "step_cache_start": 0.2,
        "step_cache_max_skips": 3,
        "step_cache_retention": True,
        "step_cache_file": Path("m.json"),
    }
    assert {key: found[key] for key in expected} == expected
    assert menma("sample", config, "-p", "x", "--calibrate").code == 0
    assert recorded("sample").calibrate


def test_sample_refuses_wrong_guidance_before_anything_starts(menma, config):
    for words, problem in (
        (["--slg-layers", "nine"], "--slg-layers"),
        (["--slg-layers", "99"], "there is no block 99"),
        (["--step-cache", "tea"], "did you mean 'teacache'"),
        (["--cfg-skip", "sometimes"], "sampling.cfg_skip_mode"),
        (["--calibrate", "--vary", "num_steps=4,5"], "does not go with --vary"),
        (["--calibrate", "--interactive"], "does not go with --interactive"),
    ):
        answer = menma("sample", config, "-p", "x", *words)
        assert answer.code == 2
        assert problem in answer.err


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--strength", "2"], "--strength: input should be less than or equal to 1, not 2.0"),
        (["--strength", "nan"], "--strength: input should be a finite number"),
    ],
)
def test_sample_refuses_what_no_prompt_may_have(menma, config, words, problem):
    answer = menma("sample", config, "-p", "x", "--video", "a.mp4", *words)
    assert answer.code == 2
    assert problem in answer.err
    assert "Traceback" not in answer.err


def test_sample_without_a_prompt_is_a_mistake(menma, config):
    assert "there is no prompt" in menma("sample", config).err
    assert menma("sample", config, "--image", "a.png").code == 2
    assert menma("sample", config, "-p", "x", "--prompts-file", "x.txt").code == 2


def test_merge_takes_options_or_a_config(menma, config):
    lora = Path("runs/fish/output/fish.safetensors")
    assert "menma train" in menma("merge", config, "-o", "m.safetensors").err
    lora.parent.mkdir(parents=True)
    lora.write_bytes(b"")
    assert menma("merge", config, "-o", "m.safetensors").code == 0
    assert recorded("merge").base == Path("transformer.safetensors")
    assert recorded("merge").loras[0].path == lora
    assert menma("merge", "--base", "b", "--lora", f"{lora}:0.8", "-o", "m", "--force").code == 0
    request = recorded("merge")
    assert (request.base, request.loras[0].strength, request.force) == (Path("b"), 0.8, True)


def test_merge_makes_a_file_for_each_expert_that_is_trained(menma, config, monkeypatch):
    asked = []

    def run(job, request):
        asked.append(REQUESTS[job].model_validate(request))
        paths = [f"m_{expert}.safetensors" for expert in ("high_noise", "low_noise")]
        return JobResult(events=[{"type": "output", "path": path} for path in paths])

    monkeypatch.setattr("app.cli.jobs.run_or_leave", run)
    text = Path(config).read_text(encoding="utf-8")
    model = '[model]\nvariant = "wan2.2-t2v-a14b"\nexpert = "both"\ntransformer = "low.pth"\n'
    model += 'transformer_high_noise = "high.pth"\n'
    both, shared = Path("both.toml"), Path("shared.toml")
    both.write_text(text.split("[model]")[0] + model, encoding="utf-8")
    shared.write_text(both.read_text().replace('"both"', '"shared"'), encoding="utf-8")
    output = Path("runs/fish/output")
    output.mkdir(parents=True)
    missing = menma("merge", both, "-o", "m.safetensors")
    assert missing.code == 2
    assert "fish_high_noise.safetensors does not exist yet" in missing.err
    for name in ("fish_high_noise", "fish_low_noise", "fish"):
        (output / f"{name}.safetensors").touch()
    answer = menma("merge", both, "-o", "m.safetensors")
    assert answer.out.split() == ["m_high_noise.safetensors", "m_low_noise.safetensors"]
    (request,) = asked
    assert (str(request.base), str(request.base_high_noise)) == ("low.pth", "high.pth")
    loras = [(use.path.name, use.expert) for use in request.loras]
    experts = ("high_noise", "low_noise")
    assert loras == [(f"fish_{expert}.safetensors", expert) for expert in experts]
    menma("merge", shared, "-o", "m.safetensors")
    loras = [(use.path.name, use.expert) for use in asked[-1].loras]
    assert loras == [("fish.safetensors", expert) for expert in experts]
    refused = menma("merge", both, "--base", "x", "-o", "m.safetensors")
    assert refused.code == 2
    assert "do not say which of them" in refused.err
    Path("m_low_noise.safetensors").touch()
    refused = menma("merge", both, "-o", "m.safetensors")
    assert "m_low_noise.safetensors exists already" in refused.err


def test_nothing_is_overwritten_without_force(menma, config):
    target = Path("there.safetensors")
    target.write_bytes(b"mine")
    assert menma("merge", "--base", "b", "--lora", config, "-o", target).code == 2
    assert menma("lora", "convert", "in.safetensors", target, "--layout", "peft").code == 2
    assert menma("new", "-o", target).code == 2
    assert menma("config", "deepspeed", config, "-o", target).code == 2
    assert target.read_bytes() == b"mine"
    assert (
        menma("lora", "convert", "in.safetensors", target, "--layout", "peft", "--force").code == 0
    )
    assert recorded("convert").layout == "peft"


def test_lora_inspect_shows_the_summary(menma, monkeypatch):
    summary = {
        "path": "a.safetensors",
        "layout": "kohya",
        "ranks": {"16": 300},
        "norm": 1.25,
        "zero_modules": 2,
        "metadata": {"ss_seed": "7"},
    }
    event = {"type": "output", "path": "a.safetensors", "lora": summary}
    monkeypatch.setenv("FAKE_EVENTS", json.dumps([event]))
    assert json.loads(menma("lora", "inspect", "a.safetensors", "--json").out) == summary
    text = menma("lora", "inspect", "a.safetensors").out
    assert "kohya" in text
    assert "2 modules change nothing" in text
    assert "ss_seed = 7" in text


def test_demo_and_bench_start_their_jobs(menma):
    assert menma("demo", "--dir", "there").code == 0
    assert recorded("demo").directory == Path("there")
    assert menma("bench", "one", "two").code == 0
    assert recorded("bench").names == ("one", "two")


def test_config_show_says_where_values_come_from(menma, config, monkeypatch):
    monkeypatch.setenv("MENMA__OPTIMIZER__LEARNING_RATE", "0.5")
    arguments = ("config", "show", config, "--set", "training.seed=7")
    found = json.loads(menma(*arguments, "--json").out)
    assert found["config"]["training"] == {
        "max_steps": 5, "gradient_accumulation_steps": 1, "seed": 7
    }  # fmt: skip
    assert found["sources"]["training.max_steps"] == f"{config}:13"
    assert found["sources"]["training.seed"] == "--set training.seed=7"
    assert found["sources"]["optimizer.learning_rate"].startswith("environment MENMA__")
    assert found["sources"]["memory.weight_format"] == "default"
    assert found["sources"]["dataset.sources[0].video_directory"] == f"{config}:10"
    assert found["sources"].keys() >= {"adapter.rank", "objective.flow_shift"}
    monkeypatch.delenv("MENMA__OPTIMIZER__LEARNING_RATE")
    Path("again.toml").write_text(menma(*arguments).out)
    assert load_config("again.toml") == load_config(config, ["training.seed=7"])


def test_config_deepspeed_shows_or_writes_what_the_job_says(menma, config, monkeypatch):
    told = {"zero_optimization": {"stage": 3}}
    event = {"type": "end", "reason": "done", "deepspeed": told}
    monkeypatch.setenv("FAKE_EVENTS", json.dumps([event]))
    arguments = ("config", "deepspeed", config, "--set", "distributed.zero_stage=3")
    assert json.loads(menma(*arguments).out) == told
    request = recorded("deepspeed")
    assert (request.config, request.set) == (Path(config), ("distributed.zero_stage=3",))
    assert menma(*arguments, "-o", "ds.json").out.strip() == "ds.json"
    assert json.loads(Path("ds.json").read_text()) == told


def test_doctor_reports_as_json(menma, monkeypatch):
    monkeypatch.setattr("app.domain.environment.import_check", lambda name: "")
    answer = menma("doctor", "--json")
    found = json.loads(answer.out)
    assert found["python"] == sys.version.split()[0]
    assert {"packages", "gpus", "ram_gib", "disk_free_gib", "warnings", "problems"} <= set(found)
    monkeypatch.setattr("app.domain.environment.import_check", lambda name: "no such library")
    answer = menma("doctor")
    assert answer.code == 1
    assert "torch cannot be imported: no such library" in answer.err


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script stands in for the program")
def test_doctor_reads_gpus_from_nvidia_smi(tmp_path, monkeypatch):
    from app.domain.environment import gpus

    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus() == []
    program = tmp_path / "nvidia-smi"
    line = "0, NVIDIA H200, 143771, 143000, 570.1, 9.0"
    program.write_text(f"#!/bin/sh\necho '{line}'\necho 'No devices, really'\n")
    program.chmod(0o755)
    (gpu,) = gpus()
    assert (gpu["name"], gpu["vram_gib"], gpu["compute_capability"]) == (
        "NVIDIA H200",
        140.4,
        "9.0",
    )
    program.write_text("#!/bin/sh\nexit 9\n")
    assert gpus() == []


def modules_after(script):
    answer = subprocess.run(
        [sys.executable, "-c", f"{script}\nimport sys\nprint('MODULES', *sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        env=ENVIRONMENT,
    )
    line = next(line for line in answer.stdout.splitlines() if line.startswith("MODULES"))
    return {name.partition(".")[0] for name in line.split()[1:]}


HEAVY = {"torch", "textual", "pydantic", "rich", "numpy", "tomlkit"}


@pytest.mark.parametrize(
    ("script", "allowed"),
    [
        ("import app.cli.main", set()),
        ("from app.cli.main import run\nrun(['--help'])", set()),
        # Typer reads the arguments of a command with pydantic.
        ("from app.cli.main import run\nrun(['runs', 'list'])", {"pydantic"}),
        ("import app.runs.supervise", set()),
    ],
)
def test_what_must_start_fast_loads_nothing_heavy(script, allowed):
    assert not modules_after(script) & (HEAVY - allowed)


def test_a_heavy_import_would_be_noticed():
    assert "pydantic" in modules_after("import trainer.contract.config_io")
