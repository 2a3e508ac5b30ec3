"""The options of LoRA against PEFT, and against their formulas in float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from trainer.adapters import load_adapter
from trainer.adapters.apply import attach, merge_into
from trainer.adapters.lora import LoRA
from trainer.adapters.lora_dropout import BranchDropout
from trainer.adapters.max_norm import MaxNorm
from trainer.contract.errors import ConfigError, ModelFileError
from trainer.core.types import Batch
from trainer.engine.local import LocalEngine
from trainer.engine.stepping import parameter_groups
from trainer.models.wan.transformer import WanTransformer
from trainer.optimizers.adamw import AdamW

from .tiny_models import make_transformer, model_inputs, run

TARGETS = r"blocks\.\d+\.(self_attn\.[qkvo]|ffn\.[02])"
OURS: dict[str, Any] = {"exclude": [".*"], "include": [TARGETS]}


def inject(model: nn.Module, build, seed: int = 0, **options: Any) -> LoRA:
    adapter = LoRA(LoRA.Config(**{**OURS, **options}), build)
    adapter.inject(model, seed)
    return adapter


def with_peft(model: nn.Module, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(target_modules=TARGETS, **options)).eval()


def peft_factors(wrapped: nn.Module) -> dict[str, nn.Parameter]:
    """By our names: <module>.down and <module>.up."""
    names = {"lora_A.default.weight": "down", "lora_B.default.weight": "up"}
    return {
        name.removeprefix("base_model.model.").replace(theirs, ours): parameter
        for name, parameter in wrapped.named_parameters()
        for theirs, ours in names.items()
        if name.endswith(theirs)
    }


def copy_factors(adapter: LoRA, wrapped: nn.Module) -> None:
    theirs = peft_factors(wrapped)
    assert theirs.keys() == adapter.trainable().keys()
    for name, parameter in adapter.trainable().items():
        parameter.data.copy_(theirs[name])


def disturb(wrapped: nn.Module) -> None:
    """As if they had been trained."""
    generator = torch.Generator().manual_seed(7)
    for parameter in peft_factors(wrapped).values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"rank": 4, "alpha": 6.0}, {"r": 4, "lora_alpha": 6}),
        ({"rank": 4, "alpha": 6.0, "rslora": True}, {"r": 4, "lora_alpha": 6, "use_rslora": True}),
        (
            {
                "rank": 4,
                "alpha": 2.0,
                "rslora": True,
                "rank_pattern": {r".*\.ffn\.0": 9, r"blocks\.1\..*": 2},
                "alpha_pattern": {r".*\.q": 5.0},
            },
            {
                "r": 4,
                "lora_alpha": 2,
                "use_rslora": True,
                "rank_pattern": {r".*\.ffn\.0": 9, r"blocks\.1\..*": 2},
                "alpha_pattern": {r".*\.q": 5},
            },
        ),
    ],
    ids=["plain", "rslora", "patterns"],
)
def test_model_and_file_are_what_peft_computes(build, tmp_path, ours, theirs):
    inputs = model_inputs(make_transformer())
    wrapped = with_peft(make_transformer(), **theirs)
    disturb(wrapped)
    expected = run(wrapped, inputs)
    model = make_transformer()
    adapter = inject(model, build, **ours)
    copy_factors(adapter, wrapped)
    torch.testing.assert_close(run(model, inputs), expected, rtol=1e-4, atol=1e-5)
    for layout in ("comfy", "kohya", "peft"):  # whoever reads the file applies the same scale
        path = tmp_path / f"{layout}.safetensors"
        adapter.write_output(
            adapter.trainable(), path, layout=layout, dtype=torch.float32, metadata={}
        )
        plain = make_transformer()
        attach(plain, load_adapter(path))
        torch.testing.assert_close(run(plain, inputs), expected, rtol=1e-4, atol=1e-5)


def test_pissa_is_what_peft_trains_and_the_file_fits_the_original(build, tmp_path):
    inputs, base = model_inputs(make_transformer()), make_transformer()
    before = run(base, inputs)
    wrapped = with_peft(make_transformer(), r=4, lora_alpha=2, init_lora_weights="pissa")
    model = make_transformer()
    adapter = inject(model, build, rank=4, alpha=2.0, init="pissa")
    theirs = peft_factors(wrapped)
    for name in {name.rpartition(".")[0] for name in theirs}:
        ours = {part: adapter.trainable()[f"{name}.{part}"] for part in ("down", "up")}
        product = theirs[f"{name}.up"] @ theirs[f"{name}.down"]
        torch.testing.assert_close(ours["up"] @ ours["down"], product, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(run(model, inputs), before, rtol=1e-4, atol=1e-5)
    # Signs of singular vectors are free: begin with theirs, then train both alike.
    for name, layer in adapter._layers.items():
        layer.start_down.copy_(theirs[f"{name}.down"])
        layer.start_up.copy_(theirs[f"{name}.up"])
    disturb(wrapped)
    copy_factors(adapter, wrapped)
    expected = run(wrapped, inputs)
    assert not torch.allclose(expected, before, rtol=1e-2)
    torch.testing.assert_close(run(model, inputs), expected, rtol=1e-4, atol=1e-4)
    path = tmp_path / "out.safetensors"
    adapter.write_output(
        adapter.trainable(), path, layout="comfy", dtype=torch.float32, metadata={}
    )
    read = load_adapter(path)
    assert {update.rank for update in read.values()} == {8}
    merge_into(base, read)
    torch.testing.assert_close(run(base, inputs), expected, rtol=1e-4, atol=1e-4)


def test_randomised_pissa_is_near_the_exact_one_and_repeatable(build):
    def products(init: str) -> dict[str, torch.Tensor]:
        adapter = inject(make_transformer(), build, rank=3, init=init)
        trained = adapter.trainable()
        names = {name.rpartition(".")[0] for name in trained}
        return {name: trained[f"{name}.up"] @ trained[f"{name}.down"] for name in names}

    exact, quick, again = (products(init) for init in ("pissa", "pissa_niter_16", "pissa_niter_16"))
    for name, product in exact.items():
        assert torch.equal(quick[name], again[name])
        assert (quick[name] - product).norm() < 0.02 * product.norm()


def test_pissa_s_start_is_kept_with_checkpoints(build):
    first = inject(make_transformer(), build, rank=3, init="pissa")
    other = inject(make_transformer(seed=5), build, rank=3, init="pissa")
    (kept,), (taking,) = first.techniques(), other.techniques()
    taking.load_state_dict({name: value.clone() for name, value in kept.state_dict().items()})
    for name, layer in other._layers.items():
        assert torch.equal(layer.start_down, first._layers[name].start_down)
        assert torch.equal(layer.start_up, first._layers[name].start_up)


def test_pissa_beyond_what_a_weight_has_is_refused(build):
    with pytest.raises(ConfigError, match="no 25 principal parts"):
        inject(make_transformer(), build, rank=25, init="pissa")


def test_lora_plus_groups_are_peft_s(build):
    wrapped = with_peft(make_transformer(), r=4)
    theirs = create_loraplus_optimizer(wrapped, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0)
    rates = {id(p): group["lr"] for group in theirs.param_groups for p in group["params"]}
    expected = {name: rates[id(parameter)] for name, parameter in peft_factors(wrapped).items()}
    adapter = inject(make_transformer(), build, rank=4, loraplus_lr_ratio=16.0)
    groups = parameter_groups(adapter.trainable(), adapter.lr_scales())
    ours = {id(p): 1e-3 * group["lr_scale"] for group in groups for p in group["params"]}
    assert {name: ours[id(p)] for name, p in adapter.trainable().items()} == expected


class Step(nn.Module):
    """Its loss has a gradient of 1 for every trained weight."""

    def __init__(self, parameters) -> None:
        super().__init__()
        self.parameters_ = nn.ParameterList(parameters)

    def forward(self, batch):
        return {"loss": sum(parameter.sum() for parameter in self.parameters_)}


def test_a_step_moves_each_layer_at_its_own_rate(build):
    model = make_transformer()
    lr_pattern = {r"blocks\.0\..*": 0.5, r".*\.q": 0.1}
    adapter = inject(model, build, rank=2, lr_pattern=lr_pattern, loraplus_lr_ratio=4.0)
    before = {name: value.detach().clone() for name, value in adapter.trainable().items()}
    optimizer = AdamW(AdamW.Config(weight_decay=0.0), build)
    engine = LocalEngine(
        Step(adapter.trainable().values()),
        adapter.trainable(),
        optimizer,
        device="cpu",
        max_grad_norm=0.0,
        gradient_accumulation_steps=1,
        lr_scales=adapter.lr_scales(),
    )
    batch = Batch(latents_BCFHW=torch.zeros(1, 16, 1, 2, 2), context=(), item_seeds=(0,))
    engine.forward_backward([batch])
    engine.update(1e-2)
    for name, value in adapter.trainable().items():
        block = 0.5 if name.startswith("blocks.0.") else 0.1 if ".self_attn.q." in name else 1.0
        rate = 1e-2 * block * (4.0 if name.endswith(".up") else 1.0)
        moved = (before[name] - value).detach()  # the first step of Adam is the rate itself
        torch.testing.assert_close(moved, torch.full_like(moved, rate), rtol=1e-3, atol=1e-7)


def clip(*seeds: int) -> Batch:
    context = tuple(torch.zeros(3, 32) for _ in seeds)
    return Batch(
        latents_BCFHW=torch.zeros(len(seeds), 16, 1, 2, 2), context=context, item_seeds=seeds
    )


@pytest.mark.parametrize("shape", [(2, 5, 24), (2, 24)])
def test_dropped_ranks_and_layers_are_the_formula_s(build, shape):
    model = make_transformer().train()
    adapter = inject(model, build, rank=8, alpha=4.0, rank_dropout=0.4, module_dropout=0.5)
    (technique,) = adapter.techniques()
    technique.edit_batch(clip(3, 4), torch.Generator())
    x = torch.randn(shape)
    seen = set()
    for layer in adapter._layers.values():
        if layer.in_features != 24:
            continue
        layer.up.data.normal_()
        mask = layer.mask_BR.double()
        seen |= set(mask.unique().tolist())
        low = x.double() @ layer.down.double().T
        low = low * (mask[:, None] if x.dim() == 3 else mask)
        expected = layer.base(x).double() + 0.5 * low @ layer.up.double().T
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-4)
        layer.eval()
        whole = layer.base(x).double() + 0.5 * (x.double() @ layer.down.double().T) @ (
            layer.up.double().T
        )
        torch.testing.assert_close(layer(x).double(), whole, rtol=1e-4, atol=1e-4)
    assert seen == {0.0, torch.tensor(1 / 0.6, dtype=torch.float32).double().item()}


def test_shares_that_are_dropped_are_those_asked_for(build):
    model = make_transformer()
    layers = list(inject(model, build, rank=8)._layers.values())
    dropout = BranchDropout(layers, 0.3, 0.25, seed=1)
    whole, alone = [], []
    for seed in range(400):
        dropout.edit_batch(clip(seed), torch.Generator())
        masks = torch.stack([layer.mask_BR[0] for layer in layers])
        gone = (masks == 0).all(dim=1)
        whole.append(gone.float().mean())
        alone.append((masks[~gone] == 0).float().mean())
    # All eight ranks are dropped by chance in 0.3^8 of the layers: not seen here.
    assert torch.stack(whole).mean().item() == pytest.approx(0.25, abs=0.02)
    assert torch.stack(alone).mean().item() == pytest.approx(0.3, abs=0.02)


def test_masks_are_those_of_the_sample_whatever_its_batch(build):
    model = make_transformer()
    adapter = inject(model, build, rank=8, rank_dropout=0.5)
    (technique,) = adapter.techniques()

    def masks(*seeds: int) -> torch.Tensor:
        technique.edit_batch(clip(*seeds), torch.Generator().manual_seed(len(seeds)))
        return torch.cat([layer.mask_BR for layer in adapter._layers.values()], dim=1)

    both = masks(11, 12)
    assert torch.equal(masks(12), both[1:])
    assert not torch.equal(both[0], both[1])
    restarted = inject(make_transformer(), build, rank=8, rank_dropout=0.5)
    (technique,) = restarted.techniques()
    technique.edit_batch(clip(11, 12), torch.Generator())
    again = torch.cat([layer.mask_BR for layer in restarted._layers.values()], dim=1)
    assert torch.equal(again, both)


@pytest.mark.parametrize("chunks", [1, 2])
def test_recomputing_drops_the_same(build, chunks):
    gradients = []
    for checkpointing in (False, True):
        model = make_transformer().train()
        model.gradient_checkpointing = checkpointing
        model.set_feed_forward_chunks(chunks)
        adapter = inject(model, build, rank=4, rank_dropout=0.5, module_dropout=0.2)
        for parameter in adapter.trainable().values():
            parameter.data += 0.01
        (technique,) = adapter.techniques()
        technique.edit_batch(clip(5), torch.Generator())
        run(model, model_inputs(model)).square().mean().backward()
        gradients.append({n: p.grad for n, p in adapter.trainable().items()})
    assert all(torch.equal(gradients[0][n], gradients[1][n]) for n in gradients[0])
    # A layer that is left out has a gradient of zero, and not none: ZeRO waits for each.
    assert any(not gradient.any() for gradient in gradients[0].values())


def test_norms_are_bounded_and_what_is_within_keeps_its_bits(build):
    adapter = inject(make_transformer(), build, rank=4, alpha=6.0, scale_weight_norms=0.7)
    layers = list(adapter._layers.values())
    generator = torch.Generator().manual_seed(3)
    for index, layer in enumerate(layers):
        size = 0.5 if index % 2 else 1e-3
        layer.down.data.normal_(std=size, generator=generator)
        layer.up.data.normal_(std=size, generator=generator)
    before = [(layer.down.clone(), layer.up.clone()) for layer in layers]
    (technique,) = adapter.techniques()
    assert isinstance(technique, MaxNorm)
    technique.after_step(1)
    for layer, (down, up) in zip(layers, before, strict=True):
        delta = 1.5 * up.double() @ down.double()
        norm = float(delta.norm())
        if norm <= 0.7:
            assert torch.equal(layer.down, down)
            assert torch.equal(layer.up, up)
            continue
        after = 1.5 * layer.up.double() @ layer.down.double()
        assert float(after.norm()) == pytest.approx(0.7, rel=1e-5)
        torch.testing.assert_close(after, delta * 0.7 / norm, rtol=1e-4, atol=1e-6)
        factor = math.sqrt(0.7 / norm)
        torch.testing.assert_close(layer.down.double(), down.double() * factor, rtol=1e-5, atol=0)


def written(build, path: Path, *, alpha: float = 2.0, layout: str = "kohya") -> LoRA:
    adapter = inject(make_transformer(), build, rank=3, alpha=alpha)
    for parameter in adapter.trainable().values():
        parameter.data.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    adapter.write_output(adapter.trainable(), path, layout=layout, dtype=torch.float32, metadata={})
    return adapter


@pytest.mark.parametrize("layout", ["comfy", "kohya", "peft"])
@pytest.mark.parametrize(
    "options",
    [
        {"rank": "from_weights", "include": (), "exclude": ()},
        {"rank": "from_weights", "include": (), "exclude": (), "alpha": 9.0, "rslora": True},
        {"rank": 3, "alpha": 7.0},
    ],
    ids=["as it was", "another scale", "a rank given"],
)
def test_training_starts_with_the_update_of_the_file(build, tmp_path, layout, options):
    path = tmp_path / "old.safetensors"
    written(build, path, layout=layout)
    inputs, expected = model_inputs(make_transformer()), make_transformer()
    attach(expected, load_adapter(path))
    model = make_transformer()
    adapter = inject(model, build, init_from=path, **options)
    torch.testing.assert_close(run(model, inputs), run(expected, inputs), rtol=1e-4, atol=1e-4)
    if options["rank"] == "from_weights" and "alpha" not in options:
        wanted = 1.0 if layout == "comfy" else pytest.approx(2 / 3)
        assert all(layer.scale == wanted for layer in adapter._layers.values())


def test_weights_that_do_not_fit_are_refused_by_file_and_key(build, tmp_path):
    path = tmp_path / "old.safetensors"
    written(build, path)
    with pytest.raises(ConfigError, match=r"old.safetensors: lora_unet_blocks_0_.* has rank 3"):
        inject(make_transformer(), build, init_from=path, rank=4)
    with pytest.raises(ConfigError, match=r"old\.safetensors is for another model"):
        inject(
            make_transformer(dim=32, num_heads=2),
            build,
            init_from=path,
            rank="from_weights",
            include=(),
            exclude=(),
        )
    garbage = tmp_path / "text.safetensors"
    garbage.write_text("no weights")
    with pytest.raises(ModelFileError, match=r"text\.safetensors"):
        inject(make_transformer(), build, init_from=garbage, rank=4)


def test_no_option_leaves_a_trace(build):
    """Off means absent: no techniques, no factors, no masks."""
    model: WanTransformer = make_transformer()
    adapter = inject(model, build, rank=4)
    assert adapter.techniques() == []
    assert adapter.lr_scales() == {}
    assert all(layer.mask_BR is None and not layer.has_start for layer in adapter._layers.values())
