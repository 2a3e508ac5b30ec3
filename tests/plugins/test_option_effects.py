"""Every option of schedules, samplers, losses, weightings and techniques changes what they do.

What is changed is compared with the kind at its defaults (and what it needs). A kind or an option
that is new has to come into `CHANGES`. Optimizers have the same in `tests/engine`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.contract.catalog import PLUGIN_KINDS
from trainer.contract.variants import VARIANTS
from trainer.core.rng import generator
from trainer.core.seams import BuildContext, LossSchedule, Technique
from trainer.core.types import Batch, NoisyInput


def _embedding(text: str) -> Tensor:
    return torch.full((3, 4), float(sum(map(ord, text))))


BUILD = BuildContext(
    variant=VARIANTS["wan2.1-t2v-1.3b"],
    seed=3,
    device=torch.device("cpu"),
    total_steps=20,
    encoded=_embedding,
)
NEEDED: dict[tuple[str, str], dict[str, Any]] = {
    ("lr_schedule", "piecewise"): {"points": [[0.0, 1.0], [1.0, 0.5]]},
    ("lr_schedule", "custom"): {
        "class": "torch.optim.lr_scheduler.ExponentialLR",
        "arguments": {"gamma": 0.9},
    },
    ("lr_schedule", "plateau"): {"patience": 1},
    ("loss", "huber"): {"huber_schedule": "exponential"},
    ("loss", "pseudo_huber"): {"huber_schedule": "exponential"},
    ("technique", "output_preservation"): {"trigger": "sks", "class_word": "dog"},
    ("technique", "concept_slider"): {"positive": "old", "negative": "young"},
    ("technique", "masked_loss"): {"prior_weight": 0.5},
    ("timestep_sampler", "qinglong_qwen"): {"noisy_share": 0.2},
}
"""What a kind cannot do without, or with which the others can be felt."""
_SHAPE = {"sigmoid_scale": 2.0}
_MIXTURE = {**_SHAPE, "noisy_share": 0.5, "clean_share": 0.4, "logsnr_mean": 0.0, "logsnr_std": 0.5}
_HUBER = {"huber_delta": 0.9, "huber_schedule": "snr", "huber_delta_noise": 2.0}
_FLOOR = {"min_lr_ratio": 0.4}
CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    "lr_schedule": {
        "constant": {},
        "linear": _FLOOR,
        "cosine": _FLOOR,
        "cosine_restarts": {"num_cycles": 7, "cycle_decay": 0.5, **_FLOOR},
        "polynomial": {"power": 4.0, **_FLOOR},
        "inverse_sqrt": {"timescale_steps": 3, "min_lr_ratio": 0.9999},
        "warmup_stable_decay": {"decay_ratio": 0.9, "decay_shape": "cosine", **_FLOOR},
        "rex": {"alpha": 0.1, **_FLOOR},
        "plateau": {
            "watch": "training",
            "window_steps": 5,
            "patience": 0,
            "lr_factor": 0.1,
            "threshold": 0.9,
            "cooldown": 3,
            "min_lr_ratio": 0.9,
        },
        "piecewise": {"points": [[0.0, 1.0], [1.0, 0.1]], "shape": "steps"},
        "custom": {
            "class": "torch.optim.lr_scheduler.ConstantLR",
            "arguments": {"gamma": 0.5},
        },
    },
    "timestep_sampler": {
        "uniform": {},
        "sigmoid": _SHAPE,
        "shift": {"flow_shift": 9.0, **_SHAPE},
        "logit_normal": {"logit_mean": 1.0, "logit_std": 3.0, "flow_shift": 9.0},
        "flux_shift": _SHAPE,
        "qwen_shift": _SHAPE,
        "logsnr": {"logsnr_mean": 0.0, "logsnr_std": 0.5},
        "qinglong_flux": _MIXTURE,
        "qinglong_qwen": _MIXTURE,
        "mode": {"mode_scale": 0.3},
        "bell": {"bell_center": 0.1, "bell_std": 0.9},
        "half_bell": {"bell_center": 0.1, "bell_std": 0.9},
        "content": {},
        "style": {},
    },
    "loss": {"mse": {}, "l1": {}, "huber": _HUBER, "pseudo_huber": _HUBER},
    "weighting": {
        "none": {},
        "sigma_sqrt": {"sigma_floor": 0.6},
        "cosmap": {},
        "bell": {"weighting_center": 0.1, "weighting_std": 0.9},
        "min_snr": {"min_snr_gamma": 0.2},
    },
    "technique": {
        "contrastive_flow": {"weight": 0.9},
        "immiscible_noise": {"assignment": "batch", "num_candidates": 9},
        "noise_offset": {"strength": 0.9, "per_frame": True},
        "pyramid_noise": {"discount": 0.1, "num_levels": 1},
        "blank_prompt_preservation": {"blank_share": 0.9},
        "output_preservation": {"trigger": "cat", "class_word": "pet", "class_share": 0.9},
        "concept_slider": {"positive": "a", "negative": "b", "target": "c", "slider_scale": 9.0},
        "text_token_dropout": {"token_share": 0.9},
        "masked_loss": {"outside_weight": 0.5, "prior_weight": 2.0, "normalize": False},
    },
}


def make(kind: str, name: str, options: dict[str, Any]) -> Any:
    plugin: Any = PLUGIN_KINDS[kind].load(name)
    return plugin(plugin.Config(**NEEDED.get((kind, name), {}) | options), BUILD)


def course(schedule: Any) -> list[float]:
    """Return the factors of a course in which the loss falls, and stays, and falls a little."""
    found = []
    for step in range(20):
        found.append(schedule.factor(step / 19, 20))
        if isinstance(schedule, LossSchedule):
            schedule.observe((1.0, 0.8, 0.8, 0.8, 0.79, 0.8, 0.1, 0.1, 0.1, 0.1)[step % 10])
    return found


def draws(sampler: Any) -> list[float]:
    distribution = sampler.distribution(1560)
    return [distribution.quantile(share / 20) for share in range(1, 20)]


def losses(loss: Any) -> list[float]:
    """Return losses of small and large errors at several sigmas."""
    error = torch.tensor([0.1, 0.6, 4.0]).repeat(4, 1)
    found: Tensor = loss(error, torch.zeros(4, 3), torch.tensor([0.1, 0.4, 0.6, 0.9]))
    return found.flatten().tolist()


def weights(weighting: Any) -> list[float]:
    found: Tensor = weighting(torch.linspace(0.02, 0.98, 20))
    return found.tolist()


CAPTIONS = ("a sks cat", "sks", "a cat", "nothing") * 4


def step_of(technique: Technique) -> list[Tensor]:
    """Return all that a technique makes of a batch: texts, noise, target, map and terms."""
    random = generator(5)
    shape = (len(CAPTIONS), 2, 3, 8, 8)
    mask = torch.zeros(shape[0], 1, *shape[2:])
    mask[..., :3] = 1
    batch = Batch(
        latents_BCFHW=torch.randn(shape, generator=random),
        context=tuple(torch.ones(9, 4) * len(caption) for caption in CAPTIONS),
        captions=CAPTIONS,
        item_seeds=tuple(range(shape[0])),
        mask_B1FHW=mask,
    )
    noise = torch.randn(shape, generator=random)
    batch = technique.edit_batch(batch, generator(1))
    noisy = NoisyInput.mix(batch.latents_BCFHW, noise, torch.linspace(0.1, 0.9, shape[0]))
    noisy = technique.edit_noisy(noisy, batch, generator(2))

    def predicted(noisy: NoisyInput, batch: Batch) -> Tensor:
        said = torch.stack([item.mean() for item in batch.context]).view(-1, 1, 1, 1, 1)
        return noisy.noisy_latents_BCFHW + said

    target = technique.edit_target(noisy.noise_BCFHW.clone(), batch, noisy, predicted)
    weight = technique.loss_map(batch, noisy)
    terms = technique.loss_terms(batch, noisy, predicted(noisy, batch), predicted)
    return [
        *batch.context,
        noisy.noise_BCFHW,
        target,
        *([] if weight is None else [weight]),
        *(term.value for term in terms),
    ]


OUTCOMES: dict[str, Callable[[Any], Any]] = {
    "lr_schedule": course,
    "timestep_sampler": draws,
    "loss": losses,
    "weighting": weights,
    "technique": step_of,
}


def same(one: Any, other: Any) -> bool:
    if isinstance(one[0], Tensor):
        return len(one) == len(other) and all(map(torch.equal, one, other))
    return bool(one == other)


@pytest.mark.parametrize("kind", CHANGES)
def test_every_option_is_tried(kind: str) -> None:
    for name in PLUGIN_KINDS[kind].names:
        fields = PLUGIN_KINDS[kind].load(name).Config.model_fields
        options = {field.alias or key for key, field in fields.items()}
        assert set(CHANGES[kind][name]) == options, f"{kind} {name}"
    assert set(CHANGES[kind]) == set(PLUGIN_KINDS[kind].names)


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, names in CHANGES.items() for name in names]
)
def test_every_option_changes_what_is_done(kind: str, name: str) -> None:
    outcome = OUTCOMES[kind]
    plain = outcome(make(kind, name, {}))
    assert same(plain, outcome(make(kind, name, {}))), "not by chance"
    for key, value in CHANGES[kind][name].items():
        assert not same(outcome(make(kind, name, _going_with(name, key, value))), plain), key


def _going_with(name: str, key: str, value: Any) -> dict[str, Any]:
    """Return the option with what it cannot be changed without."""
    if (name, key) == ("custom", "class"):
        return {key: value, "arguments": {}}
    if (name, key) == ("plateau", "window_steps"):
        return {key: value, "watch": "training"}
    return {key: value}


def test_what_is_tried_is_no_default() -> None:
    for kind, names in CHANGES.items():
        for name, options in names.items():
            fields = PLUGIN_KINDS[kind].load(name).Config.model_fields
            defaults = {field.alias or key: field.default for key, field in fields.items()}
            assert not [key for key, value in options.items() if value == defaults[key]], name
