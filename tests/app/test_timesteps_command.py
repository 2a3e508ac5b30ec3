"""`menma timesteps`: the table, the words, the JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import NormalDist

import pytest

T2V = 'model.variant="wan2.2-t2v-a14b"'


def objective(**options: object) -> list[str]:
    """Return `--set` for keys of `[objective]`."""
    values = [f"objective.{name}={json.dumps(value)}" for name, value in options.items()]
    return [word for value in values for word in ("--set", value)]


def shifted_below(sigma: float, shift: float) -> float:
    """Return P(draw < σ) of the `shift` sampler."""
    odds = sigma / (1 - sigma) / shift
    return NormalDist().cdf(math.log(odds))


def test_the_table_and_the_words(menma, config):
    answer = menma("timesteps", config, "--bins", "4", *objective(flow_shift=5.0))
    assert answer.code == 0
    lines = answer.out.splitlines()
    assert lines[0].split() == ["TIMESTEPS", "SHARE", "WEIGHT", "DRAWS"]
    edges = [0, *(shifted_below(sigma, 5.0) for sigma in (0.25, 0.5, 0.75)), 1]
    for line, low, high in zip(lines[1:], edges, edges[1:], strict=False):
        assert f"{high - low:.1%}" in line
    assert max(lines[1:], key=lambda line: line.count("#")).count("#") == 30
    assert "Sampler shift (flow_shift 5, sigmoid_scale 1); weighting none." in answer.err
    assert "Timesteps 0 to 1000; half of the draws are below 833" in answer.err  # 5/6
    assert not Path("request.json").exists()  # no trainer was started


def test_json_has_what_training_draws(menma, config):
    answer = menma(
        "timesteps", config, "--json", "--bins", "2",
        *objective(timestep_sampler="uniform", weighting="min_snr", min_snr_gamma=1.0,
                   min_timestep=500, num_timestep_buckets=6),
    )  # fmt: skip
    found = json.loads(answer.out)
    assert (found["timestep_sampler"], found["num_timestep_buckets"]) == ("uniform", 6)
    (only,) = found["ranges"]
    assert only["expert"] is None
    assert [(one["low"], one["high"]) for one in only["bins"]] == [(500, 750), (750, 1000)]
    assert [one["share"] for one in only["bins"]] == pytest.approx([0.5, 0.5])
    # min((1 - σ)², σ²) over its mean 1/12; above ½ the mean of (1 - σ)² is 1/12.
    assert [one["weight"] for one in only["bins"]] == pytest.approx([0.1406 * 12, 0.0156 * 12],
                                                                    abs=0.01)  # fmt: skip
    assert only["mean_weight"] == pytest.approx(1.0, abs=1e-4)
    assert only["percentiles"]["25"] == pytest.approx(625)


def test_each_expert_has_its_range_and_its_shift(menma, config):
    answer = menma(
        "timesteps", config, "--json", "--set", T2V, "--set", 'model.expert="both"',
        "--set", "low_noise.flow_shift=3.0", "--set", "training.max_steps=1000",
        *objective(flow_shift=7.0, preserve_distribution_shape=True),
    )  # fmt: skip
    high, low = json.loads(answer.out)["ranges"]
    assert (high["expert"], low["expert"]) == ("high_noise", "low_noise")
    assert (high["min_timestep"], low["max_timestep"]) == (875, 875)
    assert high["steps_share"] == pytest.approx(0.5)
    assert len(high["bins"]) == len(low["bins"]) == 10
    assert sum(one["share"] for one in high["bins"]) == pytest.approx(1)
    for one, shift, below in ((high, 7.0, 0.5), (low, 3.0, 0.0)):
        inside = 0.5 if one is high else shifted_below(0.875, 3.0)
        sigma = one["percentiles"]["50"] / 1000
        assert (shifted_below(sigma, shift) - below) / inside == pytest.approx(0.5)
    words = menma(
        "timesteps",
        config,
        "--set",
        T2V,
        "--set",
        'model.expert="shared"',
        "--set",
        "training.max_steps=1000",
    )
    assert "high_noise: timesteps 875 to 1000, " in words.err
    assert words.out.splitlines()[0].split()[0] == "EXPERT"


def test_a_sampler_by_size_needs_the_variant(menma, config):
    by_size = objective(timestep_sampler="flux_shift")
    known = menma("timesteps", config, *by_size, "--set", T2V, "--set", 'model.expert="low_noise"')
    assert known.code == 0
    assert "low_noise: timesteps 0 to 875" in known.err
    unknown = menma("timesteps", config, *by_size, "--set", 'model.variant="auto"')
    assert unknown.code == 2
    assert "model.variant" in unknown.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_timestep_buckets": 1}, "2 or more"),
        ({"num_timestep_buckets": "all"}, '"epoch"'),
        ({"timestep_sampler": "qinglong_flux", "noisy_share": 0.6, "clean_share": 0.6},
         "add up to 1.2"),
        ({"timestep_sampler": "bell", "bell_std": 0.01, "min_timestep": 900,
          "preserve_distribution_shape": True}, "practically never draws from 900 to 1000"),
        ({"loss": "huber", "huber_delta_noise": 0.2}, "objective.huber_delta_noise"),
        ({"timestep_sampler": "flux_shfit"}, "flux_shift"),
        ({"timestep_sampler": "mode", "mode_scale": 2.0}, "1.75"),
        ({"weighting": "cosmap", "sigma_floor": 0.2}, "sigma_floor"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_told(menma, config, options, words):
    answer = menma("timesteps", config, *objective(**options))
    assert answer.code == 2
    assert words in answer.err
    assert "Traceback" not in answer.err


def test_buckets_and_weights_are_in_the_words(menma, config):
    answer = menma(
        "timesteps", config,
        *objective(num_timestep_buckets="epoch", weighting="sigma_sqrt", timestep_sampler="style"),
    )  # fmt: skip
    assert "Sampler style, in turn from as many buckets as an epoch has items" in answer.err
    assert "weighting sigma_sqrt." in answer.err
