"""Text embeddings as the transformer wants them: zero-padded, at no cost for the zeros.

Wan was trained on text padded with zero rows to 512 tokens and attends to them without a mask, so
the rows matter. But they are all alike: n equal keys and values weigh as much as one whose logit is
raised by log n. So the zero rows are stood for by two rows with such a bias, and neither the text
embedding nor any block's keys, values and attention are computed 512 tokens wide.

Shape letters: B batch, T text tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.contract.errors import DataError

_STAND_INS = 2
"""Rows that stand for all zero rows. With one, rounding its bias to bfloat16 would change their
joint weight by up to 1.6 %; the second makes up for the first one's rounding."""


def prepare_context(
    context: Tensor | Sequence[Tensor],
    text_len: int,
    text_dim: int,
    dtype: torch.dtype,
    *,
    compact: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return the text rows to embed, (B, T, text_dim) in `dtype`, and the bias of each, (B, T).

    Args:
        context: (B, T, text_dim), padded or not, or one (T_i, text_dim) per sample.
        text_len: length that the rows are understood to be padded to.
        text_dim: width of the text encoder.
        dtype: of the result.
        compact: stand in for zero rows; otherwise pad to `text_len` and return no bias.

    Raises:
        DataError: a row count above `text_len`, or another width.
    """
    texts = list(context)
    for text in texts:
        if text.dim() != 2 or text.shape[1] != text_dim:
            raise DataError(
                f"a text embedding is {tuple(text.shape)}; (tokens, {text_dim}) is needed"
            )
        if text.shape[0] > text_len:
            raise DataError(f"a text embedding has {text.shape[0]} tokens; {text_len} are allowed")
    lengths = _lengths(context) if compact else [text.shape[0] for text in texts]
    compact = compact and max(lengths) + _STAND_INS < text_len
    width = max(lengths) + _STAND_INS if compact else text_len
    rows_BTD = texts[0].new_zeros((len(texts), width, text_dim), dtype=dtype)
    for index, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        rows_BTD[index, :length] = text[:length]
    if not compact:
        return rows_BTD, None
    biases = [_bias(length, width, text_len, dtype) for length in lengths]
    return rows_BTD, torch.stack(biases).to(rows_BTD.device)


def _lengths(context: Tensor | Sequence[Tensor]) -> list[int]:
    # One tensor for all samples is padded somehow; a list is taken to hold what the encoder gave,
    # because looking would make the CPU wait for the GPU in every step.
    if not isinstance(context, Tensor):
        return [text.shape[0] for text in context]
    filled_BT = context.detach().ne(0).any(-1)
    position_T = torch.arange(1, context.shape[1] + 1, device=context.device)
    lengths: list[int] = (filled_BT * position_T).amax(1).tolist()
    return lengths


def _bias(length: int, width: int, text_len: int, dtype: torch.dtype) -> Tensor:
    """Bias (T) of one sample: 0 for its text, log n shared by two rows, none of the rest."""
    bias_T = torch.full((width,), -math.inf, dtype=dtype)
    bias_T[:length] = 0
    missing = text_len - length
    most = torch.tensor(math.log(missing), dtype=dtype)
    while math.exp(most.item()) >= missing:
        most = torch.nextafter(most, torch.zeros_like(most))
    bias_T[length] = most
    bias_T[length + 1] = math.log(missing - math.exp(most.item()))
    return bias_T
