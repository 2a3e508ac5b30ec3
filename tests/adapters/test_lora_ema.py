"""`menma lora ema`: weights against the published formula, averages against matrices."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from trainer.adapters import load_adapter
from trainer.adapters.base import LoRAFactors
from trainer.adapters.formats.writer import save_adapter
from trainer.contract.errors import ConfigError
from trainer.jobs.ema_weights import (
    constant_betas,
    file_weights,
    linear_betas,
    power_betas,
    power_exponent,
)

from .lora_tool_runs import (
    best_approximation,
    deltas,
    effect,
    header,
    lora,
    refusal,
    tool,
)
from .tiny_models import make_factors, make_transformer


@pytest.mark.parametrize(
    ("sigma_rel", "exponent"),
    [(0.05, 16.97), (0.10, 6.94), (0.15, 3.56), (0.20, 1.826), (0.25, 0.720)],
)
def test_the_exponent_is_the_root_of_the_cubic(sigma_rel, exponent):
    found = power_exponent(sigma_rel)
    assert found == pytest.approx(exponent, abs=6e-3)
    cubic = found**3 + 7 * found**2 + (16 - sigma_rel**-2) * found + 12 - sigma_rel**-2
    assert cubic == pytest.approx(0, abs=1e-9 * sigma_rel**-2 * (found + 1))


def test_weights_of_six_files():
    weights = file_weights(power_betas(6, 0.2))
    assert weights == pytest.approx([0.0063, 0.0385, 0.0962, 0.177, 0.279, 0.403], abs=6e-4)
    # An index that starts at 1 for the second file would give the oldest file nothing.
    assert weights[0] > 0
    assert file_weights(constant_betas(6, 0.95))[0] == pytest.approx(0.95**5)


def test_weights_follow_the_power_function():
    """The weight of file i is the share of t^γ between i − 1 and i, as the name says."""
    exponent, count = power_exponent(0.15), 9
    wanted = [
        (i / count) ** (exponent + 1) - ((i - 1) / count) ** (exponent + 1)
        for i in range(1, count + 1)
    ]
    assert file_weights(power_betas(count, 0.15)) == pytest.approx(wanted)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.2888, 0.5, float("nan")])
def test_widths_without_an_exponent_are_refused(sigma_rel):
    with pytest.raises(ConfigError, match=r"sigma_rel"):
        power_exponent(sigma_rel)


def test_the_widest_average_counts_all_alike():
    assert file_weights(power_betas(5, 12**-0.5)) == pytest.approx([0.2] * 5, abs=1e-6)


@given(st.integers(2, 12), st.floats(0, 0.99), st.floats(0, 0.99))
def test_weights_sum_to_one(count, beta, beta2):
    betas = linear_betas(count, beta, beta2)
    assert (betas[0], len(betas)) == (beta, count - 1)
    if count > 2:
        assert betas[-1] == pytest.approx(beta2)
    assert sum(file_weights(betas)) == pytest.approx(1)


def checkpoints(folder, count=4, **options):
    """Files of one run: each a small step from the last; returned in the order of training."""
    factors = make_factors(make_transformer(), alpha=3.0)
    files = []
    for number in range(count):
        stream = torch.Generator().manual_seed(50 + number)
        factors = {
            name: LoRAFactors(
                pair.down_RI + 0.01 * torch.randn(pair.down_RI.shape, generator=stream),
                pair.up_OR + 0.01 * torch.randn(pair.up_OR.shape, generator=stream),
                pair.alpha,
            )
            for name, pair in factors.items()
        }
        path = folder / f"fish-{number * 5 + 5}.safetensors"
        metadata = {"ss_steps": str(100 * number + 100), "ss_seed": "7", "ss_loraid": "3"}
        save_adapter(factors, path, **({"dtype": torch.float32, "metadata": metadata} | options))
        files.append(path)
    return files


@pytest.mark.parametrize("layout", ["kohya", "comfy", "peft"])
def test_factors_are_averaged_and_all_else_is_kept(tmp_path, layout):
    files = checkpoints(tmp_path, layout=layout)
    output = tmp_path / "out.safetensors"
    (event,) = tool("lora_ema", files=files[::-1], output=output, sigma_rel=0.2)
    weights = file_weights(power_betas(4, 0.2))
    assert [part["file"] for part in event["weights"]] == [file.name for file in files]
    assert [part["weight"] for part in event["weights"]] == pytest.approx(weights)
    found, tables = load_file(output), [load_file(file) for file in files]
    assert found.keys() == tables[0].keys()
    for key, value in found.items():
        wanted = sum(w * table[key].double() for w, table in zip(weights, tables, strict=True))
        torch.testing.assert_close(value.double(), wanted, rtol=1e-6, atol=1e-7)
    before, after = header(files[-1]), header(output)
    changed = {key for key in before if after.get(key) != before[key]}
    assert changed == {"sshs_model_hash"}
    assert "ema" in after["menma.history"]
    mean = tmp_path / "mean.safetensors"
    tool("lora_ema", files=files, output=mean, sigma_rel=0.2, exact=True)
    torch.testing.assert_close(effect((output, 1.0)), effect((mean, 1.0)), rtol=2e-3, atol=2e-3)


def test_the_hash_is_that_of_the_written_tensors(tmp_path):
    files = checkpoints(tmp_path, count=2)
    output, again = tmp_path / "out.safetensors", tmp_path / "again.safetensors"
    tool("lora_ema", files=files, output=output, beta=0.0)
    assert header(output)["sshs_model_hash"] == header(files[-1])["sshs_model_hash"]
    tool("lora_ema", files=files, output=again, beta=0.5)
    assert header(again)["sshs_model_hash"] != header(files[-1])["sshs_model_hash"]


def test_both_parts_of_a_file_with_two_experts_are_averaged(tmp_path):
    pairs, output = [], tmp_path / "out.safetensors"
    for number in range(2):
        for seed, expert in enumerate(("high_noise", "low_noise")):
            lora(tmp_path / f"{expert}.safetensors", seed=10 * number + seed)
        pairs.append(tmp_path / f"pair{number}.safetensors")
        one, other = (tmp_path / f"{expert}.safetensors" for expert in ("high_noise", "low_noise"))
        tool("convert", input=one, join=other, output=pairs[-1], layout="peft")
    (event,) = tool("lora_ema", files=pairs, output=output, beta=0.5)
    assert event["num_modules"] == 60
    first, second = map(load_file, pairs)
    for key, value in load_file(output).items():
        torch.testing.assert_close(value, (first[key] + second[key]) / 2)
    assert load_adapter(output, expert="low_noise").layout == "peft"


def test_exact_averages_the_updates(tmp_path):
    files = checkpoints(tmp_path, count=3, layout="kohya")
    output = tmp_path / "out.safetensors"
    (event,) = tool("lora_ema", files=files, output=output, beta=0.4, exact=True)
    assert 0.99 < event["energy"] <= 1
    weights = file_weights(constant_betas(3, 0.4))
    tables = [deltas(file) for file in files]
    for name, found in deltas(output).items():
        mean = sum(w * table[name] for w, table in zip(weights, tables, strict=True))
        torch.testing.assert_close(found, best_approximation(mean, 4), rtol=1e-4, atol=1e-6)


def test_order_is_by_steps_then_by_numbers_in_names_never_by_time(tmp_path):
    files = checkpoints(tmp_path, count=3)
    for age, file in enumerate(files):
        os.utime(file, (1000 - age, 1000 - age))

    def order(given, **options):
        (event,) = tool(
            "lora_ema", files=given, output=tmp_path / "out.safetensors", force=True, **options
        )
        return [part["file"] for part in event["weights"]]

    names = [file.name for file in files]
    assert order(files[::-1]) == names
    assert order(files[::-1], sort=False) == names[::-1]
    for file, name in zip(checkpoints(tmp_path, count=3, metadata={}), names, strict=True):
        assert file.name == name
    assert order([files[1], files[0], files[2]]) == names  # 5, 10, 15: not as text


def test_few_files_at_a_large_beta_are_warned_of(tmp_path):
    (event,) = tool("lora_ema", files=checkpoints(tmp_path), output=tmp_path / "o.safetensors")
    assert "fish-5.safetensors, counts 86 %" in event["said"][0]


def test_files_of_other_scales_or_modules_are_refused(tmp_path, capfd):
    one, two, three = (tmp_path / f"{name}.safetensors" for name in "abc")
    lora(one, alpha=2.0)
    lora(two, alpha=4.0)
    lora(three, names=["blocks.0.ffn.0"])
    output = tmp_path / "out.safetensors"
    words = refusal("lora_ema", tmp_path, capfd, files=[one, two], output=output)
    assert "lora_unet_blocks_0_cross_attn_k.alpha is 2.0" in words
    words = refusal("lora_ema", tmp_path, capfd, files=[one, three], output=output)
    assert "in one of them only" in words
    words = refusal("lora_ema", tmp_path, capfd, files=[one, one], output=output)
    assert "given twice" in words
    both = {"files": [one, two], "output": output, "sigma_rel": 0.2, "beta": 0.5}
    assert "two ways" in refusal("lora_ema", tmp_path, capfd, **both)
    words = refusal("lora_ema", tmp_path, capfd, files=[one, two], output=output, sigma_rel=0.5)
    assert "0.2887" in words
