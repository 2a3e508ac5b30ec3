"""Results that forwards of one video have in common, computed once instead of in every step.

A result is found again by the very tensors that it was computed from, unchanged since, and by the
layers that computed it: their weights, the adapters on them and those's strengths. Whatever is not
the same is computed anew, so that nothing has to be told when it changes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

T = TypeVar("T")


class Kept:
    """The results that were asked for last."""

    def __init__(self, size: int) -> None:
        """Keep nothing yet, and never more than `size` results."""
        self._size = size
        # What a result was made of stays alive with it: no other object gets its identity.
        self._results: dict[Hashable, tuple[Any, Any]] = {}

    def get(
        self,
        given: Sequence[Tensor | None],
        layers: Sequence[nn.Module],
        make: Callable[[], T],
        *,
        twice: bool = False,
    ) -> T:
        """Return what `make` makes of `given` with `layers`, or made of them before.

        Args:
            given: all tensors that the result depends on, beside those of the layers.
            layers: all layers.
            make: computes the result, which nobody may change.
            twice: it is asked for two times and let go the second time, where its memory counts.
        """
        key = _identity(given, layers)
        if key is None:
            return make()
        if key in self._results:
            entry = self._results.pop(key)
            if not twice:
                self._results[key] = entry  # the last to go, now
            found: T = entry[1]
            return found
        while len(self._results) >= self._size:
            del self._results[next(iter(self._results))]
        made = make()
        self._results[key] = (tuple(given), made)
        return made


class KeptResults:
    """What a transformer keeps while it samples a video.

    Shape letters: B batch, L tokens, D width.

    Attributes:
        times: timesteps of the step, embedded.
        texts: the text of each context, embedded, and its bias.
        images: CLIP tokens, embedded, for each number of passes that run as one batch.
        keys_and_values: of each block's cross-attention, for each text and image.
        starts: tokens (B, L, D) behind the first block's self-attention. No text has reached them
            yet, so a step's passes with prompt and negative prompt have them in common. None: not
            asked for.
    """

    def __init__(self, num_blocks: int, *, starts: bool) -> None:
        """Keep nothing yet."""
        self.times = Kept(1)
        self.texts = Kept(_TEXTS)
        self.images = Kept(_BATCHES)
        self.keys_and_values = Kept((_TEXTS + _BATCHES) * num_blocks)
        self.starts = Kept(1) if starts else None


_TEXTS = 4
"""Prompt, negative prompt, and room for others."""
_BATCHES = 2
"""Prompt and negative prompt together, and a pass alone."""


def _identity(given: Iterable[Tensor | None], layers: Iterable[nn.Module]) -> Hashable | None:
    """Return what tells a result from all others; None: it cannot be told, and is not kept."""
    tensors = [tensor for tensor in given if tensor is not None]
    modules: list[tuple[nn.Module, float]] = []
    for layer in layers:
        for module in layer.modules():
            hooked = module._forward_hooks or module._forward_pre_hooks
            if hooked or getattr(module, "by_sample", False):
                return None
            modules.append((module, getattr(module, "strength", 1.0)))
            own = (*module._parameters.values(), *module._buffers.values())
            tensors += [tensor for tensor in own if tensor is not None]
    if any(tensor.is_inference() for tensor in tensors):
        return None  # they do not count their changes
    return tuple(modules), tuple((id(tensor), tensor._version) for tensor in tensors)
