from __future__ import annotations

import json

import pytest

from trainer.contract.config import RunConfig
from trainer.contract.metadata import TrainingFacts, as_strings, training_metadata

FACTS = TrainingFacts(
    session_id="17",
    started_at=1.0,
    finished_at=1_700_000_000.0,
    step=300,
    total_steps=400,
    epoch=3,
    num_items=12,
    num_batches_per_epoch=6,
    version="0.1.0",
)


def config(**changes) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "fox",
            "model": {"transformer": "/home/someone/secret/low.safetensors", "vae": "/x/vae.pth"},
            "sampling": {"prompts": [{"prompt": "private words"}]},
            "dataset": {"file": "/home/someone/clips.toml"},
            "output": {"title": "Fox", "tags": ["animal", "red"], "license": "CC0"},
            "objective": {"min_timestep": 100, "flow_shift": 5.0},
            **changes,
        }
    )


def test_header_says_how_it_was_trained():
    table = training_metadata(config(), FACTS, variant="wan2.2-t2v-a14b", expert="low_noise")
    assert all(isinstance(value, str) for value in table.values())
    assert table["ss_base_model_version"] == "wan2.2"
    assert table["ss_steps"] == "300"
    assert table["ss_max_train_steps"] == "400"
    assert table["ss_seed"] == "42"
    assert table["ss_sd_model_name"] == "low.safetensors"
    assert table["ss_discrete_flow_shift"] == "5.0"
    assert table["modelspec.architecture"] == "wan2.2/lora"
    assert table["modelspec.title"] == "Fox"
    assert table["modelspec.tags"] == "animal, red"
    assert table["modelspec.date"] == "2023-11-14T22:13:20+00:00"
    assert table["modelspec.timestep_range"] == "100,1000"
    assert table["menma.variant"] == "wan2.2-t2v-a14b"
    assert table["menma.expert"] == "low_noise"
    assert "modelspec.author" not in table


def test_nothing_private_is_written():
    elsewhere = config(
        validation={"sources": [{"video_directory": "/home/someone/held_out"}], "batch_size": 2},
        distributed={"hostfile": "/x/hosts", "nvme_path": "/x/nvme", "zero_stage": 2},
    )
    text = json.dumps(training_metadata(elsewhere, FACTS, variant="wan2.1-t2v-1.3b"))
    assert all(word in text for word in ("batch_size", "zero_stage"))
    for private in (
        "someone",
        "secret/",
        "private words",
        "clips.toml",
        "/x/",
        "held_out",
        "hosts",
    ):
        assert private not in text
    assert "low.safetensors" in text


def test_the_config_can_be_taken_out_again():
    table = training_metadata(config(training={"seed": 7}), FACTS, variant="wan2.1-t2v-1.3b")
    stored = json.loads(table["menma.run_config"])
    assert stored["training"] == {"seed": 7}
    assert "prompts" not in table["menma.run_config"]


def test_the_expert_names_the_file_it_was_trained_from():
    model = {"transformer": "low.pth", "transformer_high_noise": "high.pth", "expert": "high_noise"}
    table = training_metadata(config(model=model), FACTS, variant="wan2.2-i2v-a14b")
    assert table["ss_sd_model_name"] == "high.pth"


@pytest.mark.parametrize("kind", ["lora", "none"])
def test_kind_of_file(kind):
    table = training_metadata(config(adapter={"kind": kind}), FACTS, variant="")
    assert table["menma.kind"] == {"lora": "lora", "none": "transformer"}[kind]
    assert table["modelspec.architecture"] == f"wan/{table['menma.kind']}"


def test_empty_values_are_left_out():
    assert as_strings({"a": None, "b": "", "c": 0, "d": False, "e": [1]}) == {
        "c": "0",
        "d": "False",
        "e": "[1]",
    }
