"""A tiny Wan transformer, its twin in diffusers, and LoRA factors for it."""

from __future__ import annotations

import torch

from trainer.adapters.base import LoRAFactors
from trainer.adapters.targets import linear_layers
from trainer.contract.diffusers_names import to_diffusers_name
from trainer.contract.variants import TransformerConfig
from trainer.core.types import Batch
from trainer.models.wan.transformer import WanTransformer

SIZES = {"dim": 24, "ffn_dim": 48, "num_heads": 2, "num_layers": 3, "text_dim": 32, "freq_dim": 16}


def make_transformer(*, image: bool = False, seed: int = 0, **sizes: int) -> WanTransformer:
    extra = {"image_dim": 1280, "in_channels": 36} if image else {}
    config = TransformerConfig(**{**SIZES, **extra, **sizes})
    model = WanTransformer(config, seed=None)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return model


def batch(number: int) -> Batch:
    """Return a clip for the tiny model, another one for each number."""
    random = torch.Generator().manual_seed(number)
    return Batch(
        latents_BCFHW=torch.randn(1, 16, 2, 4, 4, generator=random),
        context=(torch.randn(3, 32, generator=random),),
        captions=("a",),
        item_seeds=(number,),
    )


def make_twin(model: WanTransformer):
    """The same weights in diffusers' class."""
    from diffusers import WanTransformer3DModel

    config = model.config
    twin = WanTransformer3DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        image_dim=config.image_dim,
        added_kv_proj_dim=config.dim if config.image_dim else None,
    )
    twin.load_state_dict(
        {to_diffusers_name(name): value for name, value in model.state_dict().items()}
    )
    return twin.eval()


def make_factors(
    model: torch.nn.Module,
    *,
    rank: int = 4,
    alpha: float = 2.0,
    names=None,
    seed: int = 1,
    dtype: torch.dtype = torch.float32,
) -> dict[str, LoRAFactors]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {n: (m.out_features, m.in_features) for n, m in linear_layers(model).items()}
    chosen = [n for n in shapes if n.startswith("blocks.")] if names is None else names
    factors = {}
    for name in chosen:
        outputs, inputs = shapes[name]
        down = torch.randn(rank, inputs, generator=generator) * 0.1
        up = torch.randn(outputs, rank, generator=generator) * 0.1
        factors[name] = LoRAFactors(down.to(dtype), up.to(dtype), alpha)
    return factors


def model_inputs(model: WanTransformer, seed: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    return {
        "latents": torch.randn(1, 16, 2, 4, 4, generator=generator),
        "timestep": torch.tensor([500.0]),
        "context": torch.randn(1, 7, config.text_dim, generator=generator),
    }


def run(model: WanTransformer, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(inputs["latents"], inputs["timestep"], inputs["context"])


def run_twin(twin, inputs: dict[str, torch.Tensor], text_len: int = 512) -> torch.Tensor:
    context = inputs["context"]
    padded = torch.nn.functional.pad(context, (0, 0, 0, text_len - context.shape[1]))
    return twin(
        hidden_states=inputs["latents"],
        timestep=inputs["timestep"],
        encoder_hidden_states=padded,
        return_dict=False,
    )[0]


def expected_weights(
    model: WanTransformer, factors: dict[str, LoRAFactors], strength: float = 1.0
) -> dict[str, torch.Tensor]:
    """W + strength · (alpha / rank) · up @ down in float64, independent of the code under test."""
    state = {name: value.double() for name, value in model.state_dict().items()}
    for name, pair in factors.items():
        product = pair.up_OR.double() @ pair.down_RI.double()
        state[f"{name}.weight"] += strength * pair.alpha / pair.down_RI.shape[0] * product
    return state
