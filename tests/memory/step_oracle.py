"""Menma's own training step of a config, built on fake tensors and watched."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from memory_oracle import Peak, make_fake, watched
from torch import nn

from trainer.adapters.branch import BranchLinear
from trainer.adapters.dora import DoRA
from trainer.adapters.dora_linear import DoRALinear
from trainer.adapters.full import FullFineTune
from trainer.adapters.loha import LoHa
from trainer.adapters.loha_linear import NAMES, HadamardProduct
from trainer.adapters.lokr import LoKr
from trainer.adapters.lokr_linear import kronecker_layer
from trainer.adapters.lora import LoRA
from trainer.adapters.lora_linear import LoRALinear
from trainer.contract.catalog import ADAPTERS
from trainer.contract.config import RunConfig
from trainer.contract.kronecker import lokr_shapes
from trainer.contract.memory_model.techniques import uses_masks
from trainer.contract.memory_model.workload import Workload, workload_of
from trainer.core.seams import BuildContext
from trainer.core.types import Batch
from trainer.jobs.build import build_objective, build_techniques, fp8_spec, weights_dtype
from trainer.models.wan.quantised import is_block_linear
from trainer.models.wan.transformer import FLOAT32_MODULES, WanTransformer
from trainer.quant.fp8 import QuantisedWeight
from trainer.quant.linear import Fp8Linear
from trainer.quant.products import Fp8Products
from trainer.training.step import TrainStep


def measure_step(config: RunConfig) -> Peak:
    """Return the peak of one update on one process, from a state in which there was one before."""
    work = workload_of(config)
    with watched() as live:
        step, adapter = _build_step(config, work)
        trained = list(adapter.trainable().values())
        updated = [_master(parameter) for parameter in trained]
        optimizer = torch.optim.AdamW(updated, fused=True)
        _make_state(optimizer, updated)
        batch = _batch(work)
        live.start()
        accumulation = config.training.gradient_accumulation_steps
        for _ in range(accumulation):
            terms = step(batch)
            (sum(terms.values()) / accumulation).backward()
            del terms
            _to_masters(trained, updated)
        optimizer.step()
        return live.peak


def _build_step(config: RunConfig, work: Workload) -> tuple[TrainStep, Any]:
    with torch.device("meta"):
        model = WanTransformer(work.shape, seed=None)
    dtype = weights_dtype(config)
    make_fake(model, lambda name: torch.float32 if name.startswith(FLOAT32_MODULES) else dtype)
    if (spec := fp8_spec(config)) is not None:
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and is_block_linear(f"{name}.weight", (1, 1)):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, _fp8_layer(module, spec))
    build = BuildContext(variant=work.variant, seed=0, device=torch.device("cpu"), total_steps=1)
    adapter: Any
    if config.adapter.kind == "none":
        adapter = FullFineTune(FullFineTune.Config(**config.adapter.options("kind")), build)
        adapter.inject(model, 0)
    else:
        implementation = ADAPTERS.load(config.adapter.kind)
        adapter = implementation(implementation.Config(**config.adapter.options("kind")), build)
        with patch.object(implementation, "make_layer", _FAKE_LAYERS[config.adapter.kind]):
            adapter.inject(model, 0)
    model.gradient_checkpointing = config.memory.gradient_checkpointing
    model.blocks.keep_attention = config.memory.keep_attention
    model.set_feed_forward_chunks(config.memory.feed_forward_chunks)
    model.set_attention_chunks(config.memory.attention_chunks)
    objective = build_objective(config, build)
    step = TrainStep(
        model,
        objective,
        build_techniques(config, build, 2),
        0,
        model.blocks.suspended,
        suspended_adapter=adapter.suspended,
    )
    return step.train(), adapter


def _fp8_layer(layer: nn.Linear, spec: Any) -> Fp8Linear:
    outputs, inputs = layer.weight.shape
    shape = spec.scale_shape(outputs, inputs)
    scale = None
    if shape is not None:
        scale = torch.empty(shape, dtype=torch.bfloat16 if shape[1] > 1 else torch.float32)
    weight = QuantisedWeight(torch.empty(outputs, inputs, dtype=spec.dtype), scale)
    return Fp8Linear(weight, layer.bias, Fp8Products() if spec.matmul else None)


def _fake_layer(self: LoRA, name: str, base: Any, seed: int) -> LoRALinear:
    rank = self.plan[name].rank
    down, up = torch.empty(rank, base.in_features), torch.empty(base.out_features, rank)
    start = (down.clone(), up.clone()) if self.config.init != "kaiming" else None
    return LoRALinear(base, nn.Parameter(down), nn.Parameter(up), 1.0, start=start)


def _empty(shapes: dict[str, tuple[int, ...]]) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.empty(shape)) for name, shape in shapes.items()}


def _fake_loha(self: LoHa, name: str, base: Any, seed: int) -> BranchLinear:
    outer, inner = (base.out_features, self.rank_of(name)), (self.rank_of(name), base.in_features)
    tensors = _empty({key: outer if key.endswith("a") else inner for key in NAMES})
    return BranchLinear(base, tensors, HadamardProduct(), 1.0)


def _fake_lokr(self: LoKr, name: str, base: Any, seed: int) -> BranchLinear:
    options = {"factor": self.config.factor, "decompose_both": self.config.decompose_both}
    shapes = lokr_shapes(base.in_features, base.out_features, self.rank_of(name), **options)
    return kronecker_layer(base, _empty({**shapes}), 1.0)


def _fake_dora(self: DoRA, name: str, base: Any, seed: int) -> DoRALinear:
    inputs, outputs, rank = base.in_features, base.out_features, self.rank_of(name)
    parts = _empty({"down": (rank, inputs), "up": (outputs, rank), "magnitude": (outputs,)})
    return DoRALinear(base, *parts.values(), 1.0, torch.empty(outputs))


_FAKE_LAYERS = {"lora": _fake_layer, "loha": _fake_loha, "lokr": _fake_lokr, "dora": _fake_dora}


def _batch(work: Workload) -> Batch:
    shape, clip, stride = work.shape, work.clip, work.variant.vae_stride
    size = (clip.latent_frames(work.variant), clip.height // stride[1], clip.width // stride[2])
    images = shape.image_tokens * (2 if shape.image_position_embedding else 1)
    extra = shape.in_channels - shape.out_channels
    return Batch(
        latents_BCFHW=torch.empty(clip.batch, shape.out_channels, *size),
        context=tuple(
            torch.empty(shape.text_len, shape.text_dim, dtype=torch.bfloat16)
            for _ in range(clip.batch)
        ),
        extra_channels_BCFHW=(
            torch.empty(clip.batch, extra, *size, dtype=torch.bfloat16) if extra else None
        ),
        image_context_BTD=(
            torch.empty(clip.batch, images, shape.image_dim, dtype=torch.bfloat16)
            if shape.image_dim
            else None
        ),
        item_seeds=tuple(range(clip.batch)),
        mask_B1FHW=torch.empty(clip.batch, 1, *size) if uses_masks(work.config) else None,
    )


def _master(parameter: nn.Parameter) -> nn.Parameter:
    if parameter.dtype == torch.float32:
        return parameter
    return nn.Parameter(parameter.detach().float())


def _to_masters(trained: list[nn.Parameter], updated: list[nn.Parameter]) -> None:
    """Add bf16 gradients up in float32, as the local engine does."""
    for parameter, master in zip(trained, updated, strict=True):
        if parameter is not master and parameter.grad is not None:
            gradient = parameter.grad.float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            parameter.grad = None


def _make_state(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
