"""Classifier-free guidance (Ho & Salimans, arXiv:2207.12598): away from the negative prompt."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def guided_velocity(
    velocity: Callable[[Tensor], Tensor],
    context_TD: Tensor,
    negative_context_TD: Tensor | None,
    guidance_scale: float,
) -> Tensor:
    """Return v_neg + g·(v_pos - v_neg), float32; at g = 1 the negative pass is not made.

    The passes run one after the other: a batch of two would double the activations.

    Args:
        velocity: the transformer with everything fixed but the context.
        context_TD: embedding of the prompt.
        negative_context_TD: embedding of the negative prompt; may be None at g = 1.
        guidance_scale: g.

    Raises:
        ValueError: guidance without a negative embedding.
    """
    positive = velocity(context_TD).float()
    if not needs_negative(guidance_scale):
        return positive
    if negative_context_TD is None:
        raise ValueError(f"guidance_scale {guidance_scale} needs a negative prompt embedding")
    negative = velocity(negative_context_TD).float()
    return negative + guidance_scale * (positive - negative)


def needs_negative(guidance_scale: float) -> bool:
    """Return whether this guidance needs the pass with the negative prompt."""
    return guidance_scale != 1
