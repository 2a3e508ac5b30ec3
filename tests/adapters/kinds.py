"""LoHa, LoKr and DoRA updates with random numbers, and what they make of a weight, by formula."""

from __future__ import annotations

import math

import torch

from trainer.adapters.base import LoRAFactors
from trainer.adapters.dora_linear import DoRAFactors
from trainer.adapters.loha_linear import LoHaFactors
from trainer.adapters.lokr_linear import lokr_factors
from trainer.adapters.targets import linear_layers
from trainer.contract.kronecker import lokr_shapes

KINDS = ("lora", "loha", "lokr", "lokr whole", "lokr cut twice", "dora")


def make_update(kind, outputs, inputs, *, rank=3, alpha=2.0, seed=1, dtype=torch.float32, size=0.3):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return (torch.randn(*shape, generator=generator) * size).to(dtype)

    if kind == "loha":
        shapes = [(outputs, rank), (rank, inputs)] * 2
        return LoHaFactors(*(draw(*shape) * 2 for shape in shapes), alpha)
    if kind.startswith("lokr"):
        own = {"lokr": 1, "lokr whole": 10**6, "lokr cut twice": 1}[kind]
        shapes = lokr_shapes(
            inputs, outputs, own, factor=None, decompose_both=kind == "lokr cut twice"
        )
        tensors = {name: draw(*shape) * 2 for name, shape in shapes.items()}
        unscaled = lokr_factors(tensors, 1.0)
        return lokr_factors(tensors, unscaled.rank if kind == "lokr whole" else alpha)
    down, up = draw(rank, inputs), draw(outputs, rank)
    if kind == "lora":
        return LoRAFactors(down, up, alpha)
    magnitude = torch.rand(outputs, generator=generator) + 0.5
    return DoRAFactors(down, up, magnitude, alpha)


def make_updates(model, kind, names=None, **options):
    shapes = {n: (m.out_features, m.in_features) for n, m in linear_layers(model).items()}
    chosen = [n for n in shapes if n.startswith("blocks.")] if names is None else names
    return {
        name: make_update(kind, *shapes[name], seed=index, **options)
        for index, name in enumerate(chosen)
    }


def changed(update, weight, strength=1.0):
    """The updated weight in float64, written down anew, independent of the code under test."""
    parts = {role: tensor.double() for role, tensor in update.tensors().items()}
    weight = weight.double()
    if update.kind == "loha":
        one, two = parts["w1_a"] @ parts["w1_b"], parts["w2_a"] @ parts["w2_b"]
        return weight + strength * update.alpha / parts["w1_b"].shape[0] * one * two
    if update.kind == "lokr":
        scale = 1.0
        if "w2_b" in parts or "w1_b" in parts:
            scale = update.alpha / parts.get("w2_b", parts.get("w1_b")).shape[0]
        first = parts["w1"] if "w1" in parts else parts["w1_a"] @ parts["w1_b"]
        second = parts["w2"] if "w2" in parts else parts["w2_a"] @ parts["w2_b"]
        rows, columns = len(first) * len(second), first.shape[1] * second.shape[1]
        product = torch.einsum("ac,bd->abcd", first, second).reshape(rows, columns)
        return weight + strength * scale * product
    added = update.alpha / len(parts["down"]) * parts["up"] @ parts["down"]
    if update.kind == "lora":
        return weight + strength * added
    lengths = (weight + added).square().sum(1, keepdim=True).sqrt()
    whole = parts["magnitude"][:, None] * (weight + added) / lengths
    return weight + strength * (whole - weight)


def spread(tensor):
    return math.sqrt(float(tensor.double().square().mean()))
