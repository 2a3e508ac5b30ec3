"""`menma sample`: what its options about files hand over, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from app.cli.sample_output_options import preview_setting
from trainer.contract.config import load_config
from trainer.contract.jobs import REQUESTS, SampleJobRequest


def recorded() -> SampleJobRequest:
    content = json.loads(Path("request.json").read_text(encoding="utf-8"))
    return REQUESTS["sample"].model_validate(content["request"])


def test_files_are_as_they_were_asked_for(menma, config):
    assert menma("sample", config, "-p", "x").code == 0
    plain = recorded()
    assert not plain.force
    assert load_config(plain.config, plain.set).sampling.metadata
    words = ["--format", "webp", "--quality", "70", "--save-latents", "--no-metadata", "--force"]
    assert menma("sample", config, "-p", "x", *words, "-o", "{seed}.webp").code == 0
    request = recorded()
    sampling = load_config(request.config, request.set).sampling
    assert (sampling.format, sampling.quality) == ("webp", 70)
    assert (sampling.save_latents, sampling.metadata) == (True, False)
    assert (request.force, request.output) == (True, Path("{seed}.webp"))


def test_latents_beside_are_told_too(menma, config, monkeypatch):
    event = {"type": "sample", "path": "a.mp4", "latents": "a.safetensors"}
    monkeypatch.setenv("FAKE_EVENTS", json.dumps([event]))
    assert menma("sample", config, "-p", "x").out == "a.mp4\na.safetensors\n"


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--format", "mp4"], "mp4 is h264 or h265"),
        (["--format", "png", "--quality", "5"], "png keeps everything"),
        (["--quality", "0"], "sampling.quality"),
        (["--format", "latents", "--save-latents"], "the latents are the sample already"),
    ],
)
def test_what_cannot_be_written_is_refused_before_the_job(menma, config, words, problem):
    answer = menma("sample", config, "-p", "x", *words)
    assert answer.code == 2
    assert problem in answer.err
    assert not Path("request.json").exists()


def test_like_needs_no_prompt_and_takes_others(menma, config):
    Path("old.mp4").write_bytes(b"")
    assert menma("sample", config, "--like", "old.mp4", "--seed", "5").code == 0
    request = recorded()
    assert (request.like, request.prompts) == (Path("old.mp4"), ())
    assert "sampling.seed=5" in request.set
    assert menma("sample", config, "--like", "old.mp4", "--image", "b.png").code == 0
    (prompt,) = recorded().prompts
    assert (prompt.prompt, prompt.image) == ("", Path("b.png"))


def test_the_config_of_a_sample_of_a_run_is_known(menma, config):
    run = Path("runs/fish")
    (run / "samples").mkdir(parents=True)
    (run / "samples/x.mp4").write_bytes(b"")
    (run / "events.jsonl").touch()
    (run / "config.toml").write_text(config.read_text(encoding="utf-8"), encoding="utf-8")
    assert menma("sample", "--like", run / "samples/x.mp4").code == 0
    assert recorded().config.samefile(run / "config.toml")
    cell = run / "samples/sheet-seed/cells/seed-1-0123456789ab.mp4"
    cell.parent.mkdir(parents=True)
    cell.write_bytes(b"")
    assert menma("sample", "--like", cell).code == 0
    assert recorded().run_dir is not None
    assert recorded().run_dir.samefile(run)
    Path("x.mp4").write_bytes(b"")
    answer = menma("sample", "--like", "x.mp4")
    assert answer.code == 2
    assert "menma sample CONFIG --like x.mp4" in answer.err
    assert menma("sample").code == 2


def test_decoding_needs_the_vae_alone(menma, config):
    for name in ("transformer", "text_encoder"):
        line = f'{name} = "{name}.safetensors"\n'
        text = config.read_text(encoding="utf-8")
        assert line in text
        config.write_text(text.replace(line, ""), encoding="utf-8")
    Path("z.safetensors").write_bytes(b"")
    answer = menma("sample", config, "--decode", "z.safetensors")
    assert answer.code == 0
    assert recorded().decode == Path("z.safetensors")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--decode", "z.mp4"], "--decode: there is no z.mp4"),
        (["--like", "z.mp4"], "--like: there is no z.mp4"),
        (["--decode", "vae.safetensors", "--like", "vae.safetensors"], "give one of the two"),
        (["--decode", "vae.safetensors", "-p", "x"], "--prompt means nothing"),
    ],
)
def test_options_that_contradict_each_other(menma, config, words, problem):
    answer = menma("sample", config, *words)
    assert answer.code == 2
    assert problem in answer.err
    assert not Path("request.json").exists()


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["-p", "x", "--vary", "seed=1,2", "--force"], "--force means nothing to a sheet"),
        (["--interactive", "--like", "vae.safetensors"], "--like means nothing to --interactive"),
    ],
)
def test_what_means_nothing_to_sheets_and_sessions(menma, config, words, problem):
    answer = menma("sample", config, *words)
    assert answer.code == 2
    assert problem in answer.err


def test_a_sheet_is_told_which_files_are_wanted(menma, config):
    words = ["--format", "vp9", "--quality", "40", "--save-latents", "--no-metadata"]
    assert menma("sample", config, "-p", "x", "--vary", "seed=1,2", *words).code == 0
    content = json.loads(Path("request.json").read_text(encoding="utf-8"))
    request = REQUESTS["sample_matrix"].model_validate(content["request"])
    sampling = load_config(request.config, request.set).sampling
    assert (sampling.format, sampling.quality) == ("vp9", 40)
    assert (sampling.save_latents, sampling.metadata) == (True, False)


def test_previews_are_drawn_where_they_can_be(monkeypatch):
    key = "sampling.preview_every_steps"
    assert preview_setting(None, []) == []  # no terminal here
    assert preview_setting(True, []) == [f"{key}=1"]
    assert preview_setting(False, [f"{key}=3"]) == [f"{key}=0"]
    monkeypatch.setattr("app.cli.sample_output_options._can_draw", lambda: True)
    assert preview_setting(None, []) == [f"{key}=1"]
    assert preview_setting(None, [f"{key}=3"]) == []


def test_a_prompt_that_is_no_text_is_refused_whichever_it_is(menma, config):
    answer = menma("sample", config, "-p", "fine", "-p", "caf\udce9")
    assert answer.code == 2
    assert "no UTF-8 text" in answer.err
    assert "Traceback" not in answer.err
    assert not Path("request.json").exists()
