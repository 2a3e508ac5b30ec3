"""How many parameters a transformer has, and in which layers."""

from __future__ import annotations

import math

from trainer.contract.variants import TransformerConfig

_ATTENTION = ("q", "k", "v", "o")


def block_linear_parameters(shape: TransformerConfig) -> int:
    """Return the elements of the matrices of a block's linear layers: what fp8 makes smaller."""
    return sum(i * o for i, o in block_layers(shape).values())


def block_other_parameters(shape: TransformerConfig) -> int:
    """Return the elements of a block's biases, norms and modulation."""
    dim = shape.dim
    biases = sum(outputs for _, outputs in block_layers(shape).values())
    norms = 4 * dim + 2 * dim + (dim if shape.image_dim else 0)
    return biases + norms + 6 * dim


def outer_parameters(shape: TransformerConfig) -> int:
    """Return the parameters outside the blocks."""
    dim, patch = shape.dim, math.prod(shape.patch_size)
    total = shape.in_channels * patch * dim + dim
    total += _linear(shape.text_dim, dim) + _linear(dim, dim)
    total += time_parameters(shape) + _linear(dim, 6 * dim)
    total += _linear(dim, shape.out_channels * patch) + 2 * dim
    if shape.image_dim:
        image = shape.image_dim
        total += 2 * image + _linear(image, image) + _linear(image, dim) + 2 * dim
        total += 2 * shape.image_tokens * image if shape.image_position_embedding else 0
    if shape.reference_conv:
        total += shape.out_channels * math.prod(shape.patch_size[1:]) * dim + dim
    return total


def time_parameters(shape: TransformerConfig) -> int:
    """Return the parameters of the time embedding, which stays float32."""
    return _linear(shape.freq_dim, shape.dim) + _linear(shape.dim, shape.dim)


def num_parameters(shape: TransformerConfig) -> int:
    """Return all parameters."""
    block = block_linear_parameters(shape) + block_other_parameters(shape)
    return shape.num_layers * block + outer_parameters(shape)


def block_layers(shape: TransformerConfig) -> dict[str, tuple[int, int]]:
    """Return a block's linear layers: name -> inputs, outputs."""
    dim, ffn = shape.dim, shape.ffn_dim
    names = [f"self_attn.{n}" for n in _ATTENTION] + [f"cross_attn.{n}" for n in _ATTENTION]
    if shape.image_dim:
        names += ["cross_attn.k_img", "cross_attn.v_img"]
    return {**dict.fromkeys(names, (dim, dim)), "ffn.0": (dim, ffn), "ffn.2": (ffn, dim)}


def outer_layers(shape: TransformerConfig) -> dict[str, tuple[int, int]]:
    """Return the linear layers outside the blocks that a LoRA may be put on."""
    dim = shape.dim
    layers = {
        "text_embedding.0": (shape.text_dim, dim),
        "text_embedding.2": (dim, dim),
        "time_embedding.0": (shape.freq_dim, dim),
        "time_embedding.2": (dim, dim),
        "time_projection.1": (dim, 6 * dim),
        "head.head": (dim, shape.out_channels * math.prod(shape.patch_size)),
    }
    if shape.image_dim:
        layers |= {
            "img_emb.proj.1": (shape.image_dim, shape.image_dim),
            "img_emb.proj.3": (shape.image_dim, dim),
        }
    return layers


def linear_shapes(shape: TransformerConfig) -> dict[str, tuple[int, int]]:
    """Return all linear layers that an adapter may be put on: canonical name -> inputs, outputs."""
    outer = outer_layers(shape)
    head = {"head.head": outer.pop("head.head")}
    inside = block_layers(shape)
    blocks = {
        f"blocks.{index}.{name}": sizes
        for index in range(shape.num_layers)
        for name, sizes in inside.items()
    }
    return {**outer, **blocks, **head}


def parameter_sizes(shape: TransformerConfig) -> dict[str, int]:
    """Return all parameters of the transformer: canonical name -> number of elements."""
    dim, patch = shape.dim, math.prod(shape.patch_size)
    sizes = {
        "patch_embedding.weight": shape.in_channels * patch * dim,
        "patch_embedding.bias": dim,
    }
    for name, (inputs, outputs) in linear_shapes(shape).items():
        sizes |= {f"{name}.weight": inputs * outputs, f"{name}.bias": outputs}
    if shape.image_dim:
        image = shape.image_dim
        sizes |= {f"img_emb.proj.0.{part}": image for part in ("weight", "bias")}
        sizes |= {f"img_emb.proj.4.{part}": dim for part in ("weight", "bias")}
        if shape.image_position_embedding:
            sizes["img_emb.emb_pos"] = 2 * shape.image_tokens * image
    if shape.reference_conv:
        window = math.prod(shape.patch_size[1:])
        sizes |= {"ref_conv.weight": shape.out_channels * window * dim, "ref_conv.bias": dim}
    sizes["head.modulation"] = 2 * dim
    for index in range(shape.num_layers):
        sizes |= {f"blocks.{index}.{name}": n for name, n in _block_vectors(shape).items()}
    return sizes


def _block_vectors(shape: TransformerConfig) -> dict[str, int]:
    """Return a block's parameters beside its linear layers."""
    norms = ["self_attn.norm_q", "self_attn.norm_k", "cross_attn.norm_q", "cross_attn.norm_k"]
    norms += ["norm3"] + (["cross_attn.norm_k_img"] if shape.image_dim else [])
    weights = {f"{name}.weight": shape.dim for name in norms}
    return {"modulation": 6 * shape.dim, **weights, "norm3.bias": shape.dim}


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs
