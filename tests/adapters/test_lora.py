from __future__ import annotations

import math

import pytest
import torch

from trainer.adapters import load_adapter
from trainer.adapters.lora import LoRA

from .tiny_models import make_factors, make_transformer, model_inputs, run


def inject(model, build, seed=0, **options) -> LoRA:
    adapter = LoRA(LoRA.Config(**options), build)
    adapter.inject(model, seed)
    return adapter


def test_every_linear_of_the_blocks_and_nothing_else_is_trained(build):
    model = make_transformer(image=True)
    adapter = inject(model, build, rank=2)
    expected = {
        f"blocks.{i}.{layer}"
        for i in range(3)
        for layer in (
            *(f"{a}.{n}" for a in ("self_attn", "cross_attn") for n in "qkvo"),
            "cross_attn.k_img",
            "cross_attn.v_img",
            "ffn.0",
            "ffn.2",
        )
    }
    trained = adapter.trainable()
    assert {name.rpartition(".")[0] for name in trained} == expected
    learning = {id(p) for p in model.parameters() if p.requires_grad}
    assert learning == {id(p) for p in trained.values()}
    assert len(trained) == 2 * len(expected)


def test_model_is_unchanged_at_the_start_and_after_removal(transformer, build):
    inputs = model_inputs(transformer)
    before, state = run(transformer, inputs), dict(transformer.state_dict())
    adapter = inject(transformer, build)
    assert torch.equal(run(transformer, inputs), before)
    for parameter in adapter.trainable().values():
        parameter.data.fill_(0.05)
    assert not torch.allclose(run(transformer, inputs), before, atol=1e-3)
    adapter.remove()
    assert torch.equal(run(transformer, inputs), before)
    assert list(transformer.state_dict()) == list(state)


def test_initial_down_factors_are_kaiming_and_do_not_depend_on_the_selection(build):
    full = inject(make_transformer(), build, seed=5, rank=8).trainable()
    part = inject(
        make_transformer(), build, seed=5, rank=8, exclude=(r"blocks\.0\..*",)
    ).trainable()
    other = inject(make_transformer(), build, seed=6, rank=8).trainable()
    name = "blocks.2.ffn.2.down"
    assert torch.equal(full[name], part[name])
    assert not torch.equal(full[name], other[name])
    assert not torch.equal(full[name], full["blocks.1.ffn.2.down"])
    values, bound = full[name].detach(), 1 / math.sqrt(48)
    assert values.shape == (8, 48)
    assert values.abs().max() <= bound
    assert values.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert not full["blocks.2.ffn.2.up"].any()


def scales(adapter: LoRA) -> set[float]:
    return {layer.scale for layer in adapter._layers.values()}


def test_alpha_defaults_to_the_rank(build):
    assert scales(inject(make_transformer(), build, rank=4)) == {1.0}
    assert scales(inject(make_transformer(), build, rank=4, alpha=1)) == {0.25}


def test_training_reaches_a_known_update(build):
    """A LoRA can learn the weights of another LoRA: the loss falls by two orders."""
    model, goal = make_transformer(num_layers=1), make_transformer(num_layers=1)
    names = ["blocks.0.ffn.2"]
    teacher = make_factors(goal, rank=2, alpha=2, names=names)
    weight = goal.get_parameter(f"{names[0]}.weight")
    weight.data += teacher[names[0]].up_OR @ teacher[names[0]].down_RI * 3
    adapter = inject(model, build, rank=2, exclude=(".*",), include=(r"blocks\.0\.ffn\.2",))
    optimizer = torch.optim.Adam(adapter.trainable().values(), lr=0.02)
    batches = [model_inputs(model, seed) for seed in range(4)]
    with torch.no_grad():
        targets = [run(goal, batch) for batch in batches]
    losses = []
    for step in range(120):
        batch, target = batches[step % 4], targets[step % 4]
        loss = (run(model, batch) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert max(losses[-4:]) < 0.02 * max(losses[:4])


def test_checkpointing_of_the_model_changes_no_gradient(build):
    gradients = []
    for checkpointing in (False, True):
        model = make_transformer().train()
        model.gradient_checkpointing = checkpointing
        adapter = inject(model, build, rank=3)
        for parameter in adapter.trainable().values():
            parameter.data += 0.01
        run(model, model_inputs(model)).square().mean().backward()
        gradients.append({n: p.grad for n, p in adapter.trainable().items()})
    assert all(torch.equal(gradients[0][n], gradients[1][n]) for n in gradients[0])
    assert all(grad.abs().max() > 0 for grad in gradients[0].values())


@pytest.mark.parametrize("layout", ["comfy", "kohya", "peft"])
def test_output_file_holds_what_was_trained(transformer, build, tmp_path, layout):
    adapter = inject(transformer, build, rank=4, alpha=3.0, dropout=0.1)
    state = {n: torch.randn_like(p) for n, p in adapter.trainable().items()}
    path = tmp_path / "out.safetensors"
    adapter.write_output(state, path, layout=layout, dtype=torch.float32, metadata={"ss_seed": "1"})
    read = load_adapter(path)
    assert {f"{n}.{f}" for n in read for f in ("down", "up")} == set(state)
    for name, pair in read.items():
        wanted = 0.75 * state[f"{name}.up"] @ state[f"{name}.down"]
        torch.testing.assert_close(pair.scale * pair.up_OR @ pair.down_RI, wanted)
    assert read.metadata["ss_seed"] == "1"
    assert read.metadata["ss_network_dim"] == "4"
    assert read.metadata["ss_network_alpha"] == ("4" if layout == "comfy" else "3")
    assert '"dropout": 0.1' in read.metadata["ss_network_args"]


def test_a_nan_is_never_written(transformer, build, tmp_path):
    from trainer.contract.errors import ModelFileError

    adapter = inject(transformer, build)
    state = {n: p.detach().clone() for n, p in adapter.trainable().items()}
    path = tmp_path / "out.safetensors"
    path.write_bytes(b"earlier file")
    state["blocks.1.ffn.0.up"][0, 0] = math.nan
    with pytest.raises(ModelFileError, match=r"blocks\.1\.ffn\.0"):
        adapter.write_output(state, path, layout="comfy", dtype=torch.bfloat16, metadata={})
    assert path.read_bytes() == b"earlier file"
    assert list(tmp_path.iterdir()) == [path]
