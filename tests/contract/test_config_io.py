"""Reading configs: layers, messages, all problems at once."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.contract.config_io import (
    dump_config,
    load_config,
    load_config_with_sources,
    parse_override,
)
from trainer.contract.config_rules import check_files
from trainer.contract.errors import ConfigError

MINIMAL = 'name = "x"\n'


def write(folder: Path, text: str, name: str = "run.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def problems_of(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, environ={})
    return [str(problem) for problem in caught.value.problems]


def test_layers_win_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    presets = tmp_path / "menma" / "presets"
    presets.mkdir(parents=True)
    write(
        presets,
        '[preset]\ntitle = "t"\n[training]\nseed = 1\nmax_steps = 10\nepochs = 2\n'
        "[adapter]\nrank = 4\n",
        "mine.toml",
    )
    path = write(tmp_path, 'preset = "mine"\n[training]\nseed = 2\nmax_steps = 20\n')
    loaded = load_config_with_sources(
        path,
        ["training.seed=4"],
        environ={"MENMA__TRAINING__SEED": "3", "MENMA__OPTIMIZER__LEARNING_RATE": "0.5"},
    )
    config = loaded.config
    assert config.training.seed == 4
    assert config.training.max_steps == 20
    assert config.training.epochs == 2
    assert config.optimizer.learning_rate == 0.5
    assert config.adapter.options("kind")["rank"] == 4
    assert str(loaded.sources["training.seed"]) == "--set training.seed=4"
    assert str(loaded.sources["training.max_steps"]) == f"{path}:4"
    assert str(loaded.sources["optimizer.learning_rate"]).startswith("environment MENMA__")
    assert loaded.sources["training.epochs"].file == presets / "mine.toml"


def test_all_problems_at_once_with_line_and_near_name(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        'name = "x"\n'
        "[training]\nsede = 1\nmax_steps = 0\n"
        "[adapter]\nrnak = 4\nalpha = -1.0\n"
        '[objective]\ntimestep_sampler = "shfit"\n'
        "[trainin]\n"
        '[[techniques]]\nname = "contrastive_flow"\nwieght = 0.1\n',
    )
    problems = "\n".join(problems_of(path))
    assert f"{path}:3: training.sede: unknown key (did you mean 'seed'?)" in problems
    assert f"{path}:4: training.max_steps: input should be greater than or equal to 1" in problems
    assert f"{path}:6: adapter.rnak: unknown key (did you mean 'rank'?)" in problems
    assert f"{path}:7: adapter.alpha: input should be greater than 0" in problems
    assert f"{path}:9: objective.timestep_sampler: unknown timestep sampler 'shfit'" in problems
    assert "did you mean 'shift'?" in problems
    assert f"{path}:10: trainin: unknown key (did you mean 'training'?)" in problems
    assert f"{path}:13: techniques[0].wieght: unknown key (did you mean 'weight'?)" in problems


def test_options_belong_to_the_chosen_plugin(tmp_path: Path) -> None:
    text = '[objective]\ntimestep_sampler = "uniform"\nflow_shift = 3.0\n'
    (problem,) = problems_of(write(tmp_path, text))
    assert "objective.flow_shift: unknown key" in problem
    config = load_config(write(tmp_path, text.replace("uniform", "shift")), environ={})
    assert config.objective.options("timestep_sampler") == {
        "flow_shift": 3.0,
        "sigmoid_scale": 1.0,
    }
    assert config.objective.options("loss") == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[objective]\nmin_timestep = 900\nmax_timestep = 800\n", "range of trained timesteps"),
        ("[optimizer]\nlearning_rate = inf\n", "learning_rate: input should be a finite number"),
        ("[objective]\nflow_shift = inf\n", "flow_shift: input should be a finite number"),
        ('[objective]\ntimestep_sampler = "logit_normal"\nlogit_mean = nan\n', "finite number"),
        ("[distributed]\ntimeout_s = inf\n", "timeout_s: input should be a finite number"),
        ("[optimizer]\nbetas = [0.9, 1.0]\n", "betas[1]: input should be less than 1"),
        ("[optimizer]\nbetas = [-0.1, 0.9]\n", "betas[0]: input should be greater than or"),
        ('[distributed]\nengine = "local"\nzero_stage = 2\n', "no ZeRO stage 2"),
        ('[distributed]\nengine = "local"\nnum_processes = 2\n', "one process"),
        ('[adapter]\nkind = "none"\n', "needs fp32 master copies"),
        (
            '[adapter]\nkind = "none"\n[distributed]\nzero_stage = 1\n'
            "[training]\ngradient_accumulation_steps = 2\n",
            "over microbatches",
        ),
        ("[sampling]\nevery_steps = 5\n", "there is no prompt"),
        ("[sampling]\nnum_frames = 16\n", "use 13 or 17"),
        ("[validation]\nevery_steps = 5\n", "there is no clip to measure it on"),
        (
            "[validation]\nsplit = 0.1\n[[validation.sources]]\nvideo_directory = 'v'\n",
            "validation.split: clips held out of the dataset and clips of its own at once",
        ),
        ("[validation]\nsplit = 1.0\n", "validation.split: input should be less than 1"),
        ("[validation]\ntimesteps = [0]\n", "timesteps[0]: input should be greater than 0"),
        ("[validation]\ntimesteps = [1001]\n", "less than or equal to 1000"),
        ("[validation]\ntimesteps = []\n", "validation.timesteps"),
        (
            '[model]\nvariant = "wan2.2-t2v-a14b"\nexpert = "high_noise"\n'
            "[validation]\nevery_steps = 5\nsplit = 0.1\ntimesteps = [870]\n",
            "works at none of these timesteps (give some not below 875)",
        ),
        (
            '[model]\nvariant = "wan2.2-t2v-a14b"\nexpert = "low_noise"\n'
            "[validation]\nevery_steps = 5\nsplit = 0.1\ntimesteps = [875]\n",
            "works at none of these timesteps (give some below 875)",
        ),
        (
            "[memory]\nkeep_attention = true\ngradient_checkpointing = false\n",
            "everything is kept anyway",
        ),
        ('[model]\nvariant = "wan2.2-t2v-a14b"\n', "has two experts"),
        ('[model]\nexpert = "high_noise"\n', "only Wan 2.2 A14B has experts"),
        ('[model]\nvariant = "wan2.1-t2v-13b"\n', "did you mean 'wan2.1-t2v-1.3b'?"),
        ('[optimizer]\nkind = "adamw8bit"\n[distributed]\nzero_stage = 3\n', "8-bit states"),
        ('[sampling]\nsolver = "unipcc"\n', "did you mean 'unipc'?"),
        ('name = "../up"\n', "name"),
        ("[training]\nseed = true\nepochs = 1.5\n", "training.epochs"),
        ('preset = "nope"\n', "unknown preset 'nope'"),
    ],
)
def test_rules_name_the_reason(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in "\n".join(problems_of(write(tmp_path, text)))


def test_inline_dataset_problems_stand_at_their_lines(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        '[dataset.general]\nbatch_sise = 2\n[[dataset.sources]]\nvideo_directory = "v"\n'
        'frame_extraction = "haed"\n',
    )
    problems = "\n".join(problems_of(path))
    assert f"{path}:2: dataset.general.batch_sise" in problems
    assert f"{path}:5: dataset.sources[0].frame_extraction" in problems


def test_validation_source_problems_stand_at_their_lines(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        '[dataset]\nfile = "not there yet.toml"\n[[validation.sources]]\nvideo_directory = "v"\n'
        '[[validation.sources]]\nvideo_directory = "v"\ntarget_frame = [5]\n',
    )
    (problem,) = problems_of(path)
    assert f"{path}:7: validation.sources[1].target_frame: unknown key" in problem
    assert "target_frames" in problem


def test_validation_sources_follow_the_dataset_and_take_its_general_keys(tmp_path: Path) -> None:
    listed = 'video_directory = "a"\nbatch_size = 3\n'
    dataset = write(tmp_path, f"[general]\nresolution = 64\n[[datasets]]\n{listed}", "dataset.toml")
    own = '[[validation.sources]]\nvideo_directory = "b"\n[[validation.sources]]\n'
    own += 'image_directory = "c"\nresolution = 32\n'
    for where, text in (
        ("file", f'[dataset]\nfile = "{dataset}"\n'),
        ("inline", f"[dataset.general]\nresolution = 64\n[[dataset.sources]]\n{listed}"),
    ):
        config = load_config(write(tmp_path, text + own, f"{where}.toml"), environ={})
        first, second, third = config.load_all_sources().sources
        assert first == config.dataset.load().sources[0]
        assert [source.media_path.name for source in (first, second, third)] == ["a", "b", "c"]
        assert [s.resolution for s in (first, second, third)] == [(64, 64), (64, 64), (32, 32)]
        assert second.batch_size == 1
        missing = [problem.key for problem in check_files(config, "train")]
        assert "validation.sources[0]" in missing
        assert "validation.sources[1]" in missing
        again = load_config(write(tmp_path, dump_config(config), "again.toml"), environ={})
        assert again == config


def test_timesteps_are_ascending_and_each_once(tmp_path: Path) -> None:
    path = write(tmp_path, "[validation]\ntimesteps = [900, 0.5, 900.0]\n")
    assert load_config(path, environ={}).validation.timesteps == (0.5, 900.0)


def test_files_that_are_not_configs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="config file not found"):
        load_config(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match=r"not valid TOML.*line 2"):
        load_config(write(tmp_path, 'name = "x"\nrank = = 4\n'))
    binary = tmp_path / "b.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(binary)
    with pytest.raises(ConfigError, match=r"section\.key=value"):
        load_config(write(tmp_path, MINIMAL), ["training.seed"])


def test_overrides_are_checked_like_the_file(tmp_path: Path) -> None:
    (problem,) = problems_of(write(tmp_path, MINIMAL), "training.sed=1")
    assert "training.sed: unknown key (from --set training.sed=1) (did you mean 'seed'?)" in problem


@given(st.text(max_size=20), st.one_of(st.integers(), st.floats(allow_nan=False), st.booleans()))
def test_override_values_are_toml_or_text(text: str, value: float) -> None:
    shown = str(value).lower() if isinstance(value, bool) else repr(value)
    assert parse_override(f"a.b={shown}") == {"a": {"b": value}}
    parsed = parse_override(f"a={text}")["a"]
    assert (
        parsed == text.strip()
        or not isinstance(parsed, str)
        or f'"{parsed}"' in text
        or (f"'{parsed}'" in text)
    )


def test_a_dumped_config_loads_to_the_same_config(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        'name = "full"\n[model]\ntransformer = "t.safetensors"\nshape = {num_heads = 4}\n'
        '[[dataset.sources]]\nvideo_directory = "clips"\ntarget_frames = [17]\n'
        '[adapter]\nrank = 8\ninclude = ["blocks.*"]\n[optimizer]\nbetas = [0.9, 0.95]\n'
        '[lr_schedule]\nkind = "cosine"\nmin_lr_ratio = 0.1\n'
        '[[sampling.prompts]]\nprompt = "a \\"cat\\""\n'
        '[[techniques]]\nname = "contrastive_flow"\nweight = 0.1\n',
    )
    config = load_config(path, environ={})
    again = load_config(write(tmp_path, dump_config(config), "again.toml"), environ={})
    assert again == config
    assert "weight_decay = 0.01" in dump_config(config)  # defaults are written out


def test_missing_files_of_a_job_are_named_together(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        f'[model]\ntransformer = "{tmp_path}/none.safetensors"\n'
        f'[[dataset.sources]]\nvideo_directory = "{tmp_path}/clips"\n',
    )
    problems = {str(problem) for problem in check_files(load_config(path, environ={}), "cache")}
    assert any("model.transformer: no such file" in problem for problem in problems)
    assert any("dataset.sources[0]: no such file or folder" in problem for problem in problems)
    assert "model.vae: needed, but not given" in problems
    assert "model.text_encoder: needed, but not given" in problems
    assert len(problems) == 4


def test_a_dataset_file_is_checked_with_the_config(tmp_path: Path) -> None:
    dataset = write(
        tmp_path, f'[[datasets]]\nvideo_directory = "{tmp_path}/none"\n', "dataset.toml"
    )
    path = write(tmp_path, f'[dataset]\nfile = "{dataset}"\n')
    (problem,) = [
        problem
        for problem in check_files(load_config(path, environ={}), "train")
        if problem.key.startswith("dataset")
    ]
    assert problem.file == dataset
    assert "no such file or folder" in problem.message


def test_a_config_can_be_dumped_to_mean_the_same_from_anywhere(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        '[model]\ntransformer = "models/t.safetensors"\nvae = "/abs/vae.safetensors"\n'
        '[[dataset.sources]]\nvideo_directory = "clips"\ncache_directory = "cache"\n'
        '[[sampling.prompts]]\nprompt = "clips"\nimage = "a.png"\n',
    )
    base = tmp_path / "home"
    text = dump_config(load_config(path, environ={}), base=base)
    config = load_config(write(tmp_path, text, "again.toml"), environ={})
    assert config.model.transformer == base / "models/t.safetensors"
    assert config.model.vae == Path("/abs/vae.safetensors")
    (source,) = config.dataset.load().sources
    assert source.video_directory == base / "clips"
    assert source.cache_path == base / "cache"
    (prompt,) = config.sampling.prompts
    assert (prompt.prompt, prompt.image) == ("clips", base / "a.png")
    assert config.run_dir == base / "runs" / "lora"


def test_a_plug_in_chosen_above_does_not_inherit_options_of_the_one_below(tmp_path: Path) -> None:
    text = MINIMAL + (
        '\n[probe]\nkind = "shapes"\ntrigger = "zorp"\n'
        '[objective]\ntimestep_sampler = "logit_normal"\nlogit_mean = 1.0\nloss = "mse"\n'
    )
    path = write(tmp_path, text)
    chosen = ["probe.kind=none", "objective.timestep_sampler=uniform"]
    loaded = load_config_with_sources(path, chosen, environ={})
    assert loaded.config.probe.options("kind") == {}
    assert loaded.config.objective.options("timestep_sampler") == {}
    assert not {"probe.trigger", "objective.logit_mean"} & set(loaded.sources)
    environment = {"MENMA__PROBE__KIND": "none"}
    assert load_config(path, environ=environment).probe.kind == "none"
    # The same kind again, or another slot's, leaves everything as it is.
    same = load_config(path, ["probe.kind=shapes", "objective.loss=mse"], environ={})
    assert same.probe.options("kind")["trigger"] == "zorp"
    assert same.objective.options("timestep_sampler")["logit_mean"] == 1.0


def test_options_beside_a_kind_in_one_place_are_judged(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    for overrides in itertools.permutations(("adapter.kind=none", "adapter.rank=4")):
        assert any("adapter.rank: unknown key" in found for found in problems_of(path, *overrides))
    path = write(tmp_path, MINIMAL + "\n[adapter]\nrank = 4\n")
    assert ["unknown adapter 'x'" in found for found in problems_of(path, "adapter.kind=x")] == [
        True
    ]


def test_an_override_that_cannot_be_read_hides_no_other(tmp_path: Path) -> None:
    found = problems_of(write(tmp_path, MINIMAL), "foo", "training.max_stepz=5", "=1")
    assert len(found) == 3
    assert any("max_stepz" in problem for problem in found)


def test_missing_files_are_told_beside_other_mistakes(tmp_path: Path) -> None:
    text = (
        '[model]\ntransformer = "gone.safetensors"\nvae = 3\n[training]\nmax_steps = "x"\nsed = 1\n'
    )
    path = write(tmp_path, MINIMAL + text)
    with pytest.raises(ConfigError) as caught:
        load_config_with_sources(path, environ={}, jobs=["train", "cache"])
    problems = {problem.key: problem for problem in caught.value.problems}
    assert {"training.max_steps", "training.sed", "model.vae", "model.transformer"} <= set(problems)
    assert len(problems) == len(caught.value.problems)
    assert problems["model.transformer"].line == 3
    with pytest.raises(ConfigError) as caught:
        load_config_with_sources(path, environ={})
    assert "model.transformer" not in {problem.key for problem in caught.value.problems}


def test_an_unknown_key_hides_no_broken_rule(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    overrides = ("distributed.num_processes=3", "distributed.sequence_parallel=2")
    found = problems_of(path, "memory.attention_chunkz=4", *overrides)
    assert len(found) == 2
    assert any("attention_chunkz" in problem for problem in found)
    assert any("groups of 2" in problem for problem in found)
