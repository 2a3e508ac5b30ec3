"""Values of a forward come back around what is recomputed, and only there."""

from __future__ import annotations

import gc
from contextlib import nullcontext

import pytest
import torch

from trainer.core import forward_values
from trainer.core.forward_values import ForwardValue, remembered


def test_values_are_those_of_the_first_time_and_then_what_they_were():
    value = ForwardValue()
    first, second = torch.tensor(1.0), torch.tensor(2.0)
    value.tensor = first
    again = remembered()
    value.tensor = second
    for _ in range(2):  # a graph that is kept is recomputed once more
        with again:
            assert value.tensor is first
        assert value.tensor is second
    with pytest.raises(KeyError), again:
        raise KeyError
    assert value.tensor is second


def test_the_inner_context_sees_the_values():
    value = ForwardValue()
    value.tensor = torch.tensor(1.0)
    seen = []

    class Inner:
        def __enter__(self):
            seen.append(value.tensor)

        def __exit__(self, *_):
            seen.append(value.tensor)

    again, before = remembered(Inner()), value.tensor
    value.tensor = None
    with again:
        pass
    assert seen == [before, before]


def test_without_a_value_nothing_is_wrapped(monkeypatch):
    monkeypatch.setattr(forward_values, "_alive", type(forward_values._alive)())
    inner = nullcontext()
    assert remembered(inner) is inner
    value = ForwardValue()
    assert remembered(inner) is not inner
    del value
    gc.collect()
    assert remembered(inner) is inner
