"""Rounding to fp8 against a float64 grid of all fp8 numbers, and the products against floats."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.quant.fp8 import BLOCK, Fp8Spec, dequantise, quantise

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MANTISSA = {E4M3: 3, E5M2: 2}
SMALLEST = {E4M3: 2.0**-9, E5M2: 2.0**-16}
LARGEST = {E4M3: 448.0, E5M2: 57344.0}


def grid(dtype: torch.dtype) -> np.ndarray:
    """Every finite number of the format, from its definition: sign, exponent, mantissa."""
    bits = MANTISSA[dtype]
    bias = 7 if dtype == E4M3 else 15
    numbers = [0.0]
    for exponent in range(2 ** (7 - bits)):
        for mantissa in range(2**bits):
            if exponent == 0:
                numbers.append(mantissa * 2.0 ** (1 - bias - bits))
            else:
                numbers.append((1 + mantissa / 2**bits) * 2.0 ** (exponent - bias))
    positive = np.array(sorted({x for x in numbers if x <= LARGEST[dtype]}))
    return np.unique(np.concatenate([-positive, positive]))


def nearest(values: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """The distance from each value to the closest number of the format."""
    place = np.clip(np.searchsorted(numbers, values), 1, len(numbers) - 1)
    low, high = numbers[place - 1], numbers[place]
    return np.minimum(np.abs(values - low), np.abs(values - high))


def weight(outputs: int, inputs: int, std: float = 0.03, seed: int = 0) -> Tensor:
    return std * torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("inputs", [BLOCK * 3, BLOCK * 3 - 8, 24])
@pytest.mark.parametrize("scaled", [True, False])
def test_each_weight_becomes_the_nearest_number_of_the_format(dtype, inputs, scaled):
    original = weight(40, inputs)
    result = quantise(original, Fp8Spec(scaled=scaled, dtype=dtype))
    if scaled:
        factor = result.scale.double().repeat_interleave(inputs // result.scale.shape[1], dim=1)
    else:
        assert result.scale is None
        factor = torch.ones(1, 1, dtype=torch.float64)
    scaled_weight = (original.double() / factor).clamp(-LARGEST[dtype], LARGEST[dtype])
    best = nearest(scaled_weight.flatten().numpy(), grid(dtype))
    found = (result.values_OI.double() - scaled_weight).abs().flatten().numpy()
    np.testing.assert_allclose(found, best, rtol=1e-4, atol=1e-6 * SMALLEST[dtype])


@pytest.mark.parametrize(
    ("outputs", "inputs", "matmul", "shape"),
    [
        (40, 192, False, (40, 3)),
        (40, 200, False, (40, 1)),
        (40, 192, True, (40, 1)),
        (40, 63, False, (1, 1)),
        (40, 48, True, (1, 1)),
    ],
)
def test_scales_are_a_block_s_then_a_row_s_then_the_tensor_s(outputs, inputs, matmul, shape):
    spec = Fp8Spec(scaled=True, matmul=matmul)
    assert spec.scale_shape(outputs, inputs) == shape
    assert quantise(weight(outputs, inputs), spec).scale.shape == shape


def test_block_scales_are_two_bytes_per_64_weights():
    result = quantise(weight(64, 640), Fp8Spec(scaled=True))
    assert result.values_OI.element_size() == 1
    assert result.scale.nbytes * BLOCK == 2 * result.values_OI.numel()


@pytest.mark.parametrize(
    ("dtype", "scaled", "low", "high"),
    # A number with m bits of mantissa in [1, 2) is off by a uniform error of at most 2^-(m+1):
    # its root mean square, 2^-m / sqrt(12), over that of the number, sqrt(7 / 3) for numbers that
    # are spread evenly: 2.4 % for 3 bits, 4.7 % for 2. Never more than 2^-m / sqrt(12) itself.
    [
        (E4M3, True, 0.022, 0.0361),
        (E5M2, True, 0.044, 0.0722),
        # Without scales N(0, 0.03) reaches down to the subnormals of e4m3, whose steps are 2^-9.
        (E4M3, False, 0.022, 0.0361),
        (E5M2, False, 0.044, 0.0722),
    ],
)
@pytest.mark.parametrize("inputs", [512, 500])
def test_error_of_normal_weights_is_what_the_mantissa_allows(dtype, scaled, low, high, inputs):
    original = weight(512, inputs)
    result = quantise(original, Fp8Spec(scaled=scaled, dtype=dtype))
    back = dequantise(result.values_OI, result.scale, torch.float64)
    error = float((back - original).norm() / original.double().norm())
    assert low < error < high
    assert result.relative_error == pytest.approx(error, rel=1e-4)


def test_scaled_beats_plain_and_blocks_beat_rows_where_there_are_outliers():
    original = weight(128, 512)
    original[::2, 5] = 3000.0  # one large input: a row's scale then leaves the rest few steps
    rows = quantise(original, Fp8Spec(scaled=True, matmul=True))
    blocks = quantise(original, Fp8Spec(scaled=True))
    inner = slice(BLOCK, None)

    def error(result) -> float:
        back = dequantise(result.values_OI, result.scale, torch.float32)
        return float((back - original)[:, inner].norm() / original[:, inner].norm())

    assert error(blocks) < 0.9 * error(rows)
    tiny = weight(64, 512, std=1e-3)
    plain = quantise(tiny, Fp8Spec(scaled=False)).relative_error
    assert quantise(tiny, Fp8Spec(scaled=True)).relative_error < 0.2 * plain


@pytest.mark.parametrize("matmul", [False, True])
def test_zero_and_huge_weights_stay_finite(matmul):
    original = weight(32, 128)
    original[3] = 0.0
    original[4] = 3e38
    original[5] = 1e-42
    result = quantise(original, Fp8Spec(scaled=True, matmul=matmul))
    back = dequantise(result.values_OI, result.scale, torch.float32)
    assert bool((back[3] == 0).all())
    assert bool(torch.isfinite(back).all())
    assert float((back[4] / 3e38 - 1).abs().max()) < 2.0**-4
    plain = quantise(original, Fp8Spec(scaled=False))
    assert float(plain.values_OI.float().max()) == LARGEST[E4M3]


@pytest.mark.parametrize("chunk", [128, 1000, 10**9])
@pytest.mark.parametrize("spec", [Fp8Spec(scaled=True), Fp8Spec(scaled=True, matmul=True)])
@pytest.mark.parametrize("inputs", [48, 128])
def test_rounding_in_pieces_changes_nothing(monkeypatch, chunk, spec, inputs):
    original = weight(33, inputs).bfloat16()
    whole = quantise(original, spec)
    monkeypatch.setattr("trainer.quant.fp8._CHUNK_ELEMENTS", chunk)
    pieces = quantise(original, spec)
    assert torch.equal(pieces.values_OI.float(), whole.values_OI.float())
    assert torch.equal(pieces.scale, whole.scale)
    assert pieces.relative_error == pytest.approx(whole.relative_error, rel=1e-6)


def test_weights_that_fit_the_format_come_back_exactly():
    exact = torch.randint(-8, 9, (64, 128), generator=torch.Generator().manual_seed(0)).float()
    exact[:, ::BLOCK] = 14.0  # 448 = 32 * 14: every scale is a power of two
    result = quantise(exact, Fp8Spec(scaled=True))
    assert torch.equal(dequantise(result.values_OI, result.scale, torch.float32), exact)
    assert result.relative_error == 0.0


@settings(deadline=None, max_examples=40)
@given(
    outputs=st.integers(1, 9),
    inputs=st.integers(1, 200),
    exponent=st.integers(-30, 30),
    dtype=st.sampled_from([E4M3, E5M2]),
    source=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_scaled_weight_is_off_by_no_more_than_half_a_step(
    outputs, inputs, exponent, dtype, source
):
    original = (weight(outputs, inputs, seed=inputs) * 2.0**exponent).to(source)
    result = quantise(original, Fp8Spec(scaled=True, dtype=dtype))
    back = dequantise(result.values_OI, result.scale, torch.float64)
    step = result.scale.double().repeat_interleave(inputs // result.scale.shape[1], dim=1)
    # Half a step relatively for normal numbers, half a subnormal step absolutely; the scale is
    # rounded to bfloat16, so that the largest value may lie 2^-8 beyond the format.
    bound = original.double().abs() * 2.0 ** -(MANTISSA[dtype] + 1) + step * SMALLEST[dtype] / 2
    assert bool(((back - original.double()).abs() <= bound * (1 + 1e-6)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantised_weights_are_rounded_once(dtype):
    result = quantise(weight(16, 128), Fp8Spec(scaled=True))
    exact = result.values_OI.double() * result.scale.double().repeat_interleave(BLOCK, dim=1)
    found = dequantise(result.values_OI, result.scale, dtype)
    assert found.dtype == dtype
    assert torch.equal(found, exact.to(dtype))
