"""Full fine-tuning: everything is trained, and the file holds what was trained."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from trainer.adapters.full import FullFineTune
from trainer.contract.errors import ModelFileError
from trainer.models.wan.loading import load_transformer

from .tiny_models import make_transformer, model_inputs, run


@pytest.fixture
def adapter(transformer, build):
    adapter = FullFineTune(FullFineTune.Config(), build)
    transformer.requires_grad_(False)
    adapter.inject(transformer, seed=0)
    return adapter


def trained_state(seed=9):
    """Other weights than the model that the adapter was put on."""
    return {name: value.detach() for name, value in make_transformer(seed=seed).named_parameters()}


def write(adapter, state, path, dtype=torch.float32):
    adapter.write_output(state, path, layout="comfy", dtype=dtype, metadata={"ss_seed": "3"})


def test_every_parameter_is_trained(adapter, transformer):
    trainable = adapter.trainable()
    assert trainable == dict(transformer.named_parameters())
    assert all(parameter.requires_grad for parameter in trainable.values())


def test_the_file_is_the_trained_model_and_not_the_base(adapter, transformer, tmp_path):
    state, path = trained_state(), tmp_path / "tuned.safetensors"
    write(adapter, state, path)
    loaded = load_transformer(path)
    assert dict.fromkeys(state, True) == {
        name: torch.equal(value, state[name]) for name, value in loaded.named_parameters()
    }
    inputs = model_inputs(transformer)
    with torch.no_grad():
        assert torch.equal(run(loaded, inputs), run(make_transformer(seed=9), inputs))
        assert not torch.equal(run(loaded, inputs), run(transformer, inputs))
    with safe_open(path, "pt") as file:
        assert file.metadata()["ss_seed"] == "3"


def test_a_lower_precision_is_rounded_once(adapter, tmp_path):
    state, path = trained_state(), tmp_path / "tuned.safetensors"
    write(adapter, state, path, torch.bfloat16)
    with safe_open(path, "pt") as file:
        assert all(torch.equal(file.get_tensor(n), value.bfloat16()) for n, value in state.items())


@pytest.mark.parametrize(("value", "dtype"), [(1e5, torch.float16), (float("nan"), torch.float32)])
def test_what_the_file_cannot_hold_is_refused(adapter, tmp_path, value, dtype):
    state, path = trained_state(), tmp_path / "tuned.safetensors"
    path.write_bytes(b"earlier")
    state["blocks.1.ffn.0.weight"][0, 0] = value
    with pytest.raises(ModelFileError, match=r"blocks\.1\.ffn\.0\.weight"):
        write(adapter, state, path, dtype)
    assert path.read_bytes() == b"earlier"
    assert list(tmp_path.iterdir()) == [path]
