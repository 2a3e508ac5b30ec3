"""Changing trained weights and optimizer state between two steps, wherever an engine holds them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.engine.state_files import EngineState, Piece, cut, pieces_by_flat, state_of


@torch.no_grad()
def overwrite_weights(state: EngineState, values: Mapping[str, Tensor]) -> None:
    """Write whole parameters over those that `state` holds. No communication.

    Raises:
        ValueError: no such parameter, or one of another shape.
    """
    _check(state, values)
    for piece in pieces_by_flat(state):
        if piece.name not in values:
            continue
        with state.resident(piece.flat, True):
            cut(state.flats[piece.flat], piece).copy_(_part(values[piece.name], piece))


@torch.no_grad()
def scale_state(state: EngineState, factors: Mapping[str, Tensor]) -> None:
    """Multiply the optimizer's state of whole parameters, value by value. No communication.

    What the optimizer counts, such as its steps, stays: one count may serve several parameters.

    Raises:
        ValueError: no such parameter, one of another shape, or no state of one value an element.
    """
    if not state.state_names:
        raise ValueError("this optimizer's state is not one value an element")
    _check(state, factors)
    for piece in pieces_by_flat(state):
        if piece.name not in factors:
            continue
        with state.resident(piece.flat, True):
            held = state_of(state, state.flats[piece.flat])
            for name in state.state_names:
                if name in held:  # nothing before the first step
                    part = cut(held[name], piece)
                    part.mul_(_part(factors[piece.name], piece).to(part))


def _part(whole: Tensor, piece: Piece) -> Tensor:
    return whole.reshape(-1).narrow(0, piece.start, piece.numel)


def _check(state: EngineState, given: Mapping[str, Tensor]) -> None:
    for name, tensor in given.items():
        if state.shapes.get(name) != tuple(tensor.shape):
            raise ValueError(
                f"{name} of shape {tuple(tensor.shape)} is not among the trained parameters "
                f"({state.shapes.get(name, 'no such name')})"
            )
