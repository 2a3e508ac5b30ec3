"""Zero-padded text: two rows stand for all padding, and every form of a context means the same."""

from __future__ import annotations

import math

import pytest
import torch

from trainer.models.wan.context import prepare_context

TEXT_LEN, WIDTH = 512, 8


def prepare(context, dtype=torch.float32, compact=True):
    return prepare_context(context, TEXT_LEN, WIDTH, dtype, compact=compact)


def texts(*lengths: int) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(3)
    return [torch.randn(length, WIDTH, generator=random) for length in lengths]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [0, 1, 7, 200, 350, 509])
def test_the_stand_ins_weigh_as_much_as_the_padding(length, dtype):
    (bias,) = prepare(texts(length), dtype)[1]
    assert bias.dtype == dtype
    weights = bias.double().exp()
    assert torch.equal(weights[:length], torch.ones(length, dtype=torch.float64))
    # One row in bfloat16 would be off by as much as 1.6 %.
    assert weights[length:].sum().item() == pytest.approx(TEXT_LEN - length, rel=1e-4)


def test_rows_beyond_a_shorter_text_of_a_batch_count_for_nothing():
    rows, bias = prepare(texts(3, 20))
    assert rows.shape == (2, 22, WIDTH)
    assert bias[0, 5:].tolist() == [-math.inf] * 17
    assert not rows[0, 3:].any()


def test_attention_is_that_over_all_padded_rows():
    random = torch.Generator().manual_seed(4)
    query = torch.randn(6, WIDTH, generator=random, dtype=torch.float64)
    to_key, to_value = torch.randn(2, WIDTH, WIDTH, generator=random, dtype=torch.float64)
    offset = torch.randn(WIDTH, generator=random, dtype=torch.float64)

    def attend(rows: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        keys, values = rows.double() @ to_key + offset, rows.double() @ to_value + offset
        logits = query @ keys.T + (0 if bias is None else bias.double())
        return logits.softmax(-1) @ values

    text = texts(9)
    (short,), (bias,) = prepare(text)
    (whole,), none = prepare(text, compact=False)
    assert none is None
    assert whole.shape == (TEXT_LEN, WIDTH)
    torch.testing.assert_close(attend(short, bias), attend(whole, None), rtol=1e-6, atol=1e-6)


def test_one_padded_tensor_means_the_same_as_a_list():
    listed = texts(3, 20)
    padded = torch.zeros(2, 64, WIDTH)
    for index, text in enumerate(listed):
        padded[index, : text.shape[0]] = text
    for ours, theirs in zip(prepare(padded), prepare(listed), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("length", [510, 511, 512])
def test_a_text_that_leaves_no_room_is_padded(length):
    rows, bias = prepare(texts(length, 3))
    assert bias is None
    assert rows.shape == (2, TEXT_LEN, WIDTH)
    assert not rows[1, 3:].any()
