"""Configs of other trainers: every key is told about, and what comes out is a config that loads."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.domain.importing import (
    diffusion_pipe,
    diffusion_pipe_data,
    kinds,
    musubi,
    musubi_data,
    simpletuner,
    simpletuner_data,
    takenoko,
)
from app.domain.importing.command_lines import find_commands
from app.domain.importing.converting import convert, import_config
from app.domain.importing.reading import Input
from app.domain.importing.values import literal, patterns
from trainer.contract.catalog import LOSSES, OPTIMIZERS, TIMESTEP_SAMPLERS
from trainer.contract.config import RunConfig
from trainer.contract.config_io import load_config
from trainer.contract.dataset_config import SourceOptions
from trainer.contract.errors import UserError
from trainer.contract.registry import Entry

FOREIGN = Path(__file__).parent / "foreign"
FILES = (
    "musubi/t2v_13b.sh",
    "musubi/dual.toml",
    "musubi/i2v_high.bat",
    "musubi/sigma.toml",
    "musubi/dataset_videos.toml",
    "takenoko/wan22_dual.toml",
    "takenoko/tlora.toml",
    "takenoko/finetune.toml",
    "diffusion_pipe/wan21.toml",
    "diffusion_pipe/wan22_high.toml",
    "diffusion_pipe/full.toml",
    "simpletuner/config.json",
    "simpletuner/config.env",
    "simpletuner/lycoris.json",
)


def loaded(imported, tmp_path) -> RunConfig:
    """Return the config that the text is."""
    path = tmp_path / "imported.toml"
    path.write_text(imported.text, "utf-8")
    return load_config(path)


def imported_from(name, tmp_path):
    """Return what became of a fixture, and its config."""
    imported = import_config([FOREIGN / name])
    return imported, loaded(imported, tmp_path)


def rows_of(imported):
    return {row.key: row for row in imported.rows}


@pytest.mark.parametrize("name", FILES)
def test_every_fixture_becomes_a_config_that_loads(name, tmp_path):
    imported, config = imported_from(name, tmp_path)
    assert config.name == imported.name
    keys = [row.key for row in imported.rows]
    assert len(keys) == len(set(keys))
    for row in imported.rows:
        if row.status in {"different", "unsupported", "unknown"}:
            assert row.note, row
        if row.is_lost:
            assert not row.target
            assert f"{row.key} = " in imported.text, "what is lost stands in the config"


def test_a_script_of_musubi_with_its_dataset_and_prompts(tmp_path):
    imported, config = imported_from("musubi/t2v_13b.sh", tmp_path)
    assert imported.tool == "musubi"
    assert config.model.variant == "wan2.1-t2v-1.3b"
    assert str(config.model.vae) == "/models/wan/wan_2.1_vae.safetensors"
    assert str(config.model.text_encoder) == "/models/wan/models_t5_umt5-xxl-enc-bf16.pth"
    adapter = config.adapter.options("kind")
    assert (adapter["rank"], adapter["alpha"]) == (32, 1.0)  # alpha: their default
    assert adapter["loraplus_lr_ratio"] == 4
    assert adapter["exclude"] == (r"blocks\.0\..*",)
    assert config.optimizer.kind == "adamw8bit"
    assert config.lr_schedule.warmup_ratio == 0.1
    assert config.memory.weight_format == "fp8"
    assert config.memory.text_encoder_dtype == "fp8_scaled"
    assert config.output.dtype == "fp32"  # their default
    sources = config.dataset.load().sources
    assert [source.kind for source in sources] == ["video", "image"]
    assert sources[0].target_frames == (1, 25, 45)
    first, second = config.sampling.prompts
    assert (first.width, first.height, first.num_frames) == (480, 272, 33)
    assert (first.guidance_scale, first.seed, first.negative_prompt) == (6.0, 1, "blurry")
    # a prompt that says nothing means their defaults, but for the wrong flow shift
    assert (second.width, second.num_frames, second.num_steps) == (256, 1, 20)
    assert (second.negative_prompt, second.flow_shift, first.flow_shift) == ("", 3.0, None)
    assert "--g" in rows_of(imported)["sample_prompts"].note
    control = rows_of(imported)["datasets[1].control_directory"]
    assert (control.status, control.new_value) == ("carried", "/data/control")


def test_one_lora_for_both_experts_is_shared(tmp_path):
    imported, config = imported_from("musubi/dual.toml", tmp_path)
    assert (config.model.expert, config.model.expert_boundary) == ("shared", 0.875)
    assert config.memory.weight_format == "fp8_scaled"
    assert config.adapter.kind == "loha"
    assert str(config.dataset.file) == "/nowhere/dataset.toml"
    assert config.name == "my-lora-v1"
    assert config.checkpoint.keep_last == 2
    assert "0123456789abcdef" not in imported.text + str(imported.to_json(None))
    assert config.lr_schedule.warmup_ratio == 0.05
    assert (config.optimizer.kind, config.optimizer.learning_rate) == ("prodigy", 1.0)
    assert config.optimizer.options("kind")["d_coef"] == 2
    assert config.objective.timestep_sampler == "flux_shift"
    assert config.objective.weighting == "cosmap"
    assert (config.logging.tensorboard, config.logging.wandb) == (True, True)


def test_the_high_noise_expert_alone(tmp_path):
    imported, config = imported_from("musubi/i2v_high.bat", tmp_path)
    assert config.model.expert == "high_noise"
    assert config.model.transformer is None
    assert str(config.model.transformer_high_noise).startswith("C:\\models\\wan\\wan2.2")
    assert str(config.model.vae) == r"C:\models\wan\wan 2.1 vae.safetensors"
    assert (config.objective.min_timestep, config.objective.max_timestep) == (900, 1000)
    assert config.adapter.options("kind")["rank"] == "from_weights"
    strengths = [(str(one.path), one.strength) for one in config.adapter.frozen]
    assert strengths == [("a.safetensors", 0.5), ("b.safetensors", 1.0)]
    assert config.checkpoint.keep_last == 4
    assert config.distributed.num_processes == 2
    # swapping needs recomputation here, whatever is said there
    assert (config.memory.blocks_to_swap, config.memory.gradient_checkpointing) == (20, True)
    assert rows_of(imported)["brand_new_option"].status == "unknown"


def test_faults_of_sigma_sampling_are_not_copied(tmp_path):
    imported, config = imported_from("musubi/sigma.toml", tmp_path)
    assert config.objective.timestep_sampler == "logit_normal"
    options = config.objective.options("timestep_sampler")
    assert (options["logit_mean"], options["flow_shift"]) == (0.5, 1.0)
    assert "without effect" in rows_of(imported)["discrete_flow_shift"].note
    assert config.optimizer.learning_rate == 2e-6  # what counts there when it is left out
    assert config.memory.gradient_checkpointing is False
    assert config.adapter.options("kind")["rank"] == 4
    assert config.distributed.timeout_s == 1800
    assert config.lr_schedule.kind == "rex"
    assert config.lr_schedule.options("kind")["alpha"] == 0.1  # theirs; the paper has 0.5
    assert rows_of(imported)["max_train_steps"].is_lost


def test_an_expert_of_its_own_is_trained_on_all_timesteps_where_none_are_given():
    values = {"task": "t2v-A14B", "dit": "wan2.2_t2v_low_noise.safetensors"}
    imported = convert(Input("musubi", values))
    assert "min_timestep = 0.0" in imported.text
    assert "max_timestep = 1000.0" in imported.text


def test_takenoko_means_other_things_with_what_it_leaves_out(tmp_path):
    _, config = imported_from("takenoko/tlora.toml", tmp_path)
    assert config.adapter.kind == "tlora"
    adapter = config.adapter.options("kind")
    assert (adapter["alpha"], adapter["min_rank"], adapter["rank_exponent"]) == (32.0, 2, 1.5)
    assert adapter["full_rank_below"] == 875
    assert (config.output.every_steps, config.checkpoint.every_steps) == (1000, 1000)
    assert config.memory.blocks_to_swap == 10
    technique, masked = config.techniques
    assert (technique.name, technique.options("name")["weight"]) == ("contrastive_flow", 0.1)
    assert masked.name == "masked_loss"  # or the masks would do nothing
    source = config.dataset.load().sources[0]
    assert (str(source.mask_directory), source.frame_extraction) == ("/data/masks", "middle")
    assert config.optimizer.kind == "came"
    assert config.objective.options("timestep_sampler")["bell_center"] == 0.6
    assert (config.ema.decay, config.ema.warmup) == (0.99, False)


def test_takenoko_with_both_experts_and_clips_to_validate_on(tmp_path):
    imported, config = imported_from("takenoko/wan22_dual.toml", tmp_path)
    assert config.model.expert == "shared"
    file = "wan2.2_t2v_low_noise_14B_fp16.safetensors"
    assert config.model.transformer.as_posix() == f"hf:Comfy-Org/Wan_2.2/{file}"
    assert "menma fetch" in rows_of(imported)["dit"].note
    sources = config.load_all_sources().sources
    assert [source.resolution for source in sources] == [(512, 512), (832, 480), (512, 512)]
    assert config.validation.every_steps == 500
    assert config.memory.text_encoder_dtype == "fp8_scaled"
    assert config.validation.timesteps == (100, 300, 500, 700, 800, 900, 1000)
    assert config.sampling.prompts[0].num_frames == 45
    assert "dit_high_noise" in rows_of(imported)


@pytest.mark.parametrize(("theirs", "ours"), [("content", "style"), ("style", "content")])
def test_takenoko_names_two_samplers_the_other_way_round(theirs, ours):
    """Its content is u³, which prefers little noise; that is style in the paper and here."""
    row = rows_of(convert(Input("takenoko", {"timestep_sampling": theirs})))["timestep_sampling"]
    assert (row.new_value, row.status) == (ours, "different")


def test_a_whole_model_gets_the_zero_stage_that_it_needs(tmp_path):
    _, config = imported_from("takenoko/finetune.toml", tmp_path)
    assert (config.adapter.kind, config.distributed.zero_stage) == ("none", 2)


def test_diffusion_pipe_uses_each_clip_at_each_resolution(tmp_path):
    imported, config = imported_from("diffusion_pipe/wan21.toml", tmp_path)
    assert imported.name == "reef"
    assert config.model.variant == "wan2.1-t2v-1.3b"
    assert config.model.vae.name == "Wan2.1_VAE.pth"
    found = [(s.kind, s.resolution, s.num_repeats) for s in config.dataset.load().sources]
    assert found == [
        ("video", (512, 512), 5),
        ("video", (832, 480), 5),
        ("image", (1024, 1024), 1),
    ]
    assert config.dataset.load().sources[0].target_frames == (33, 65)
    assert config.objective.options("timestep_sampler")["flow_shift"] == 1.0  # their default
    assert config.training.epochs == 1000
    assert config.memory.weight_format == "fp8"
    assert config.optimizer.options("kind")["betas"] == (0.9, 0.99)


def test_diffusion_pipe_cuts_the_density_at_the_range(tmp_path):
    imported, config = imported_from("diffusion_pipe/wan22_high.toml", tmp_path)
    assert config.model.expert == "high_noise"
    objective = config.objective
    assert (objective.min_timestep, objective.max_timestep) == (875, 1000)
    assert objective.preserve_distribution_shape
    assert objective.options("timestep_sampler")["flow_shift"] == 3
    assert (config.memory.weight_format, config.memory.fp8_format) == ("fp8", "e5m2")
    assert config.adapter.options("kind")["rank"] == 4096
    assert config.training.max_steps == 2000
    assert (config.objective.loss, objective.options("loss")["huber_delta"]) == (
        "pseudo_huber",
        0.5,
    )
    assert rows_of(imported)["epochs"].status == "different"


@pytest.mark.parametrize(
    ("trainer", "values", "expected"),
    [
        ("musubi", {"save_every_n_epochs": 2, "save_state": True, "save_last_n_epochs": 3},
         {"output.every_epochs": 2, "checkpoint.every_epochs": 2, "output.keep_last": 3}),
        ("musubi", {"sample_every_n_steps": 7, "sample_every_n_epochs": 2,
                    "sample_prompts": "p.txt"},
         {"sampling.every_epochs": 2, "sampling.every_steps": 0}),
        ("musubi", {"save_every_n_steps": 100, "save_last_n_steps": 250},
         {"output.every_steps": 100, "output.keep_last": 3}),
        ("takenoko", {"save_every_n_epochs": 1, "save_state": True},
         {"output.every_epochs": 1, "output.every_steps": 1000, "checkpoint.every_epochs": 1}),
        ("diffusion-pipe", {"save_every_n_epochs": 2, "checkpoint_every_n_epochs": 1,
                            "checkpoint_every_n_minutes": 120},
         {"output.every_epochs": 2, "checkpoint.every_epochs": 1,
          "checkpoint.every_minutes": 120}),
        ("simpletuner", {"checkpoint_epoch_interval": 1, "validation_epoch_interval": 2,
                         "validation_prompt": "a cat"},
         {"output.every_epochs": 1, "checkpoint.every_epochs": 1, "sampling.every_epochs": 2}),
    ],
)  # fmt: skip
def test_intervals_in_epochs_stay_in_epochs(trainer, values, expected, tmp_path):
    imported = convert(Input(trainer, values))
    config = loaded(imported, tmp_path)
    for key, value in expected.items():
        section, _, name = key.partition(".")
        assert getattr(getattr(config, section), name) == value, key
    assert not [row.key for row in rows_of(imported).values() if row.is_lost and row.key in values]


@pytest.mark.parametrize(
    ("arguments", "step_size", "rate"),
    [
        ({}, "relative", 1.0),  # its default
        ({"relative_step": "False", "scale_parameter": "False", "warmup_init": "False"},
         "fixed", 1e-4),
        ({"relative_step": "True", "warmup_init": "True"}, "relative_warmup", 1.0),
        ({"warmup_init": "True", "relative_step": "True"}, "relative_warmup", 1.0),
    ],
)  # fmt: skip
def test_adafactors_relative_step_is_what_musubi_does(arguments, step_size, rate, tmp_path):
    values = {"optimizer_type": "Adafactor", "learning_rate": 1e-4}
    values |= {f"optimizer_args.{key}": value for key, value in arguments.items()}
    imported = convert(Input("musubi", values))
    config = loaded(imported, tmp_path)
    assert config.optimizer.options("kind").get("step_size", "fixed") == step_size
    assert config.optimizer.learning_rate == rate
    assert not [row.key for row in rows_of(imported).values() if row.is_lost and row.key in values]


def test_simpletuners_offset_noise_is_a_technique(tmp_path):
    imported = convert(Input("simpletuner", {"offset_noise": True, "noise_offset": 0.2}))
    (technique,) = loaded(imported, tmp_path).techniques
    assert technique.name == "noise_offset"
    assert technique.options("name")["strength"] == 0.2
    off = convert(Input("simpletuner", {"offset_noise": False, "noise_offset": 0.2}))
    assert loaded(off, tmp_path).techniques == ()
    assert not rows_of(off)["noise_offset"].is_lost


def test_keys_of_services_are_never_repeated(tmp_path):
    for name in ("diffusion_pipe/full.toml", "simpletuner/config.json"):
        imported, _ = imported_from(name, tmp_path)
        for secret in ("secret-of-mine", "very-secret"):
            assert secret not in imported.text + str(imported.to_json(None))


def test_simpletuner_with_its_backends(tmp_path):
    imported, config = imported_from("simpletuner/config.json", tmp_path)
    video, image = config.dataset.load().sources
    assert (video.target_frames, video.num_repeats, video.batch_size) == ((75,), 4, 2)
    assert (video.resolution, image.resolution) == ((480, 480), (496, 496))  # 0.25 megapixels
    assert config.adapter.options("kind")["dropout"] == 0.1  # their default
    assert config.memory.weight_format == "fp8_scaled"
    assert (config.sampling.width, config.sampling.height) == (832, 480)
    assert config.sampling.prompts[0].prompt == "a black and white animated scene"
    assert rows_of(imported)["backends[2].type"].is_lost
    assert config.output.layout == "peft"
    assert (config.optimizer.kind, config.lr_schedule.kind) == ("lion", "polynomial")
    optimizer = config.optimizer
    assert (optimizer.max_grad_value, optimizer.max_grad_norm) == (0.01, 0.0)  # value by value
    schedule = config.lr_schedule.options("kind")
    assert schedule["power"] == 0.8  # their default
    assert schedule["min_lr_ratio"] == pytest.approx(1e-8 / 5e-5)
    assert (config.ema.decay, config.ema.every_steps, config.ema.device) == (0.995, 2, "cpu")
    assert video.caption_lines
    assert video.caption_dropout == 0.1


def test_simpletuner_of_a_shell_file_and_of_lycoris(tmp_path):
    _, config = imported_from("simpletuner/config.env", tmp_path)
    assert config.model.expert == "low_noise"
    assert config.adapter.options("kind")["rank"] == 64
    assert config.distributed.num_processes == 2
    assert config.memory.compile_blocks
    imported, config = imported_from("simpletuner/lycoris.json", tmp_path)
    assert config.adapter.kind == "lokr"
    assert config.adapter.options("kind")["factor"] == 16
    assert config.adapter.options("kind")["rank"] == 4096  # whole matrices, as 10000 is there
    assert rows_of(imported)["lycoris.algo"].target == "adapter.kind"
    assert rows_of(imported)["lycoris.apply_preset.target_module"].is_lost
    assert config.model.transformer_high_noise.as_posix().endswith("Diffusers/transformer")
    assert config.memory.blocks_to_swap == "auto"


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("musubi/dataset_videos.toml", 2),
        ("diffusion_pipe/dataset.toml", 3),
        ("simpletuner/multidatabackend.json", 2),
    ],
)
def test_a_dataset_alone_says_nothing_about_training(name, count, tmp_path):
    imported, config = imported_from(name, tmp_path)
    assert len(config.dataset.load().sources) == count
    assert imported.defaults == []
    plain = tmp_path / "plain.toml"
    plain.write_text('name = "imported"\n')
    without = {"dataset": RunConfig().dataset, "techniques": ()}
    assert config.model_copy(update=without) == load_config(plain)


def test_what_is_not_there_today_is_taken_when_the_catalog_has_it(monkeypatch):
    """Another optimizer, sampler and loss of Menma need no change here."""
    for registry, name, like in (
        (OPTIMIZERS, "raven", "adamw"),
        (TIMESTEP_SAMPLERS, "enhanced_sigmoid", "sigmoid"),
        (LOSSES, "fourier", "mse"),
    ):
        schemas = kinds.plugin_schemas()
        kind = {id(OPTIMIZERS): "optimizer", id(LOSSES): "loss"}.get(
            id(registry), "timestep_sampler"
        )
        entries = {**registry._entries, name: Entry(name, "somewhere:Else", "new")}
        monkeypatch.setattr(registry, "_entries", entries)
        monkeypatch.setitem(schemas[kind], name, schemas[kind][like])
    values = {
        "optimizer_type": "Raven",
        "learning_rate": 3e-5,
        "timestep_sampling": "enhanced_sigmoid",
        "loss_type": "fourier",
        "datasets[0].image_directory": "/images",
    }
    imported = convert(Input("takenoko", values))
    rows = rows_of(imported)
    assert [rows[key].target for key in list(values)[:4]] == [
        "optimizer.kind",
        "optimizer.learning_rate",
        "objective.timestep_sampler",
        "objective.loss",
    ]
    assert rows["learning_rate"].new_value == 3e-5


def test_the_rate_of_an_optimizer_that_is_not_there_is_not_taken():
    values = {"optimizer_type": "SomethingNew", "learning_rate": 1.0}
    imported = convert(Input("musubi", values))
    assert rows_of(imported)["learning_rate"].is_lost
    assert "\nlearning_rate" not in imported.text


def test_classes_of_other_packages_stay_what_they_are(tmp_path):
    values = {
        "optimizer_type": "bitsandbytes.optim.AdEMAMix8bit",
        "optimizer_args.betas": "0.9,0.999,0.9999",
        "learning_rate": 2e-4,
        "lr_scheduler_type": "StepLR",
        "lr_scheduler_args.step_size": "100",
        "lr_scheduler": "cosine",
    }
    imported = convert(Input("musubi", values))
    config = loaded(imported, tmp_path)
    assert config.optimizer.kind == "custom"
    assert config.optimizer.options("kind") == {
        "class": "bitsandbytes.optim.AdEMAMix8bit",
        "arguments": {"betas": [0.9, 0.999, 0.9999]},
    }
    assert config.optimizer.learning_rate == 2e-4
    schedule = config.lr_schedule.options("kind")
    assert schedule == {
        "class": "torch.optim.lr_scheduler.StepLR",
        "arguments": {"step_size": 100},
    }
    assert not [row for row in imported.rows if row.is_lost]
    values = {"adapter.type": "lora", "optimizer.type": "Ranger21", "optimizer.lr": 1e-4}
    config = loaded(convert(Input("diffusion-pipe", values)), tmp_path)
    assert config.optimizer.options("kind")["class"] == "pytorch_optimizer.Ranger21"


def test_commands_are_read_in_three_shells():
    bash = "X=1\nA=/m\naccelerate launch --n 2 a/wan_train_network.py --x $A/y \\\n --z -6.0 --w=3"
    (command,) = find_commands(bash)
    assert command.script == "wan_train_network"
    assert command.options == {"x": "/m/y", "z": "-6.0", "w": "3"}
    assert command.launcher == {"n": "2"}
    (command,) = find_commands(
        "$m = 'C:\\a b'\npython wan_train_network.py --dit \"$m\\f\" `\n --q"
    )
    assert command.options == {"dit": r"C:\a b\f", "q": True}
    (command,) = find_commands("set M=D:\\x\npython wan_train_network.py --dit %M%\\f ^\n --l a b")
    assert command.options == {"dit": r"D:\x\f", "l": ["a", "b"]}


def test_patterns_and_literals_of_arguments():
    assert patterns(r"[r'blocks\.\d+\..*', 'head']") == [r"blocks\.\d+\..*", "head"]
    assert patterns(["a", "b"]) == ["a", "b"]
    assert [literal(t) for t in ("1e-8", "0.9,0.99", "True", "3", "'x'", "None")] == [
        1e-8, [0.9, 0.99], True, 3, "x", None,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.toml", "= 1", "not valid TOML"),
        ("a.toml", "foo = 1", "no trainer"),
        ("a.toml", "[model]\ntype = 'flux'", "Menma trains Wan"),
        ("a.json", "[1, 2]", "neither"),
        ("a.json", "{", "not valid JSON"),
        ("a.json", '{"model_family": "flux", "model_type": "lora"}', "Menma trains Wan"),
        ("a.sh", "echo hello", "no command"),
        ("a.sh", "python hv_train_network.py --dit x", "Menma trains Wan"),
        ("a.yaml", "x: 1", "no kind that can be imported"),
    ],
)
def test_what_is_nothing_to_import_is_refused(name, content, words, tmp_path):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UserError, match=words):
        import_config([path])


def test_files_of_two_trainers_are_refused():
    with pytest.raises(UserError, match="several trainers"):
        import_config([FOREIGN / "musubi/sigma.toml", FOREIGN / "simpletuner/config.json"])


def known_keys(tool: str) -> list[str]:
    """Return keys that the tables of a trainer know, datasets included."""
    table = {"musubi": musubi, "takenoko": takenoko, "diffusion-pipe": diffusion_pipe,
             "simpletuner": simpletuner}[tool].TABLE  # fmt: skip
    keys = [*table.rules, *(key for group in table.groups for key in group.keys)]
    keys = [key.replace("*", "thing") for key in keys if "[" not in key]
    fields = [*SourceOptions.model_fields, *musubi_data.KNOWN]
    if tool in {"musubi", "takenoko"}:
        keys += [f"{place}.{name}" for place in ("general", "datasets[0]", "datasets[2]")
                 for name in fields]  # fmt: skip
        keys += [f"optimizer_args.{name}" for name in ("betas", "weight_decay", "eps", "d_coef")]
        keys += [f"network_args.{name}" for name in ("algo", "factor", "rank_dropout", "new")]
    if tool == "takenoko":
        keys += [f"val[0].{name}" for name in fields]
        keys += [f"sample_prompts[0].{name}" for name in ("text", "width", "frames", "cfg_scale")]
    if tool == "diffusion-pipe":
        names = [*diffusion_pipe_data._LOST, *diffusion_pipe_data._SHAPES]
        keys += [f"{place}.{name}" for place in ("dataset", "directory[0]") for name in names]
    if tool == "simpletuner":
        names = [*simpletuner_data._BACKEND_DONE, *simpletuner_data._BACKEND_LOST]
        keys += [f"backends[{n}].{name}" for n in (0, 1) for name in (*names, "instance_data_dir")]
        keys += [
            f"lycoris.{name}" for name in ("algo", "linear_dim", "linear_alpha", "factor", "x")
        ]
    return sorted(set(keys) | {"never_heard_of"})


WORDS = ("wan", "t2v-14B", "i2v-A14B", "t2v-14b-2.2-high", "shift", "sigma", "logit_normal",
         "cosine", "a.B", "AdamW8bit", "Prodigy", "networks.lora_wan", "lycoris.kohya", "lokr",
         "bf16", "fp16", "no",
         "constant_with_warmup", "480p", "head", "chunk", "video", "image", "true", "0.1", "5%",
         "wan22", "/a/path", "a b", "[x", "float8", "uniform", "1e-4", "", "nan", "pseudo_huber",
         "832x480", "full", "int8-quanto", "tensorboard", "1,2", "\n#\x00\ufffd")  # fmt: skip
VALUES = st.one_of(
    st.booleans(),
    st.integers(-3, 3000),
    st.floats(-2, 1100, allow_nan=False),
    st.sampled_from(WORDS),
    st.lists(st.one_of(st.integers(0, 900), st.sampled_from(WORDS)), max_size=3),
    st.dictionaries(st.sampled_from(("path", "weight", "a")), st.integers(0, 3), max_size=2),
    st.none(),
)


@given(text=st.text(alphabet="wan_train.py-= \"'\\\n^`$%{}&;A1\u00e4", max_size=120))
def test_no_text_makes_reading_commands_fail(text):
    for command in find_commands(text):
        assert all(isinstance(name, str) for name in command.options)


@pytest.mark.parametrize("tool", ["musubi", "takenoko", "diffusion-pipe", "simpletuner"])
@settings(max_examples=30, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(data=st.data())
def test_any_keys_with_any_values_become_a_config_and_one_row_each(tool, data, tmp_path):
    keys = data.draw(st.lists(st.sampled_from(known_keys(tool)), max_size=30, unique=True))
    values = {key: data.draw(VALUES) for key in keys}
    imported = convert(Input(tool, dict(values)))
    assert [row.key for row in imported.rows] == keys
    loaded(imported, tmp_path)
