"""Measures what step caches need to know of a model, while it samples without one.

Shape letters: B batch, L tokens, D width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
from torch import Tensor, nn

from trainer.contract.errors import ConfigError
from trainer.contract.variants import Expert
from trainer.models.block_stack import Around
from trainer.sampling.guidance import Pass, Step
from trainer.sampling.step_cache.drift import input_distances
from trainer.sampling.step_cache.values import ExpertValues, Form, Polynomial

FORMS: Final[tuple[Form, ...]] = ("plain", "retention")
DEGREE: Final = 4
"""Of the polynomial, as in TeaCache's own."""


class Recorder:
    """A `BlockObserver` for any number of videos with as many steps each.

    The size of what the blocks add to a token is its Euclidean norm; a step's ratio is the mean
    over tokens and videos. TeaCache's polynomial is fitted to mean |r_i - r_(i-1)| / mean |r_(i-1)|
    of the same.
    """

    def __init__(self) -> None:
        self._expert: Expert | None = None
        self._first_index = 0
        self._before: dict[str, Tensor] = {}
        self._ratios: dict[tuple[Expert, str], dict[int, list[float]]] = {}
        self._changes: dict[Expert, list[tuple[int, float]]] = defaultdict(list)
        self._distances: dict[Expert, dict[Form, list[float]]] = {}

    def begin(self, step: Step, transformer: nn.Module, timesteps_S: Tensor) -> None:
        """Forget the last video, or the last expert."""
        if step.index and step.expert == self._expert:
            return
        self._expert, self._first_index, self._before = step.expert, step.index, {}
        self._distances[step.expert] = {
            form: input_distances(transformer, timesteps_S, form) for form in FORMS
        }

    def stands_in(self, step: Step, name: str, what: Pass) -> bool:
        """Return False: everything is computed."""
        return False

    def around(self, step: Step, group: Mapping[str, Pass], stands_in: bool) -> Around:
        """Return what measures the blocks."""

        def measure(tokens_BLD: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
            result = run(tokens_BLD)
            residuals = (result - tokens_BLD).float().chunk(len(group))
            for name, residual_BLD in zip(group, residuals, strict=True):
                self._note(step, name, residual_BLD)
            return result

        return measure

    def values(self) -> dict[Expert, ExpertValues]:
        """Return what was found.

        Raises:
            ConfigError: there were too few steps.
        """
        return {expert: self._values(expert) for expert in self._distances}

    def _note(self, step: Step, name: str, residual_BLD: Tensor) -> None:
        index = step.index - self._first_index
        before = self._before.get(name)
        ratio = 1.0
        if before is not None:
            ratio = float((residual_BLD.norm(dim=-1) / before.norm(dim=-1)).mean())
            change = float((residual_BLD - before).abs().mean() / before.abs().mean())
            self._changes[step.expert].append((index, change))
        by_step = self._ratios.setdefault((step.expert, name), defaultdict(list))
        by_step[index].append(ratio)
        self._before[name] = residual_BLD

    def _values(self, expert: Expert) -> ExpertValues:
        ratios = {
            name: tuple(float(np.mean(by_step[index])) for index in sorted(by_step))
            for (of, name), by_step in self._ratios.items()
            if of == expert
        }
        return ExpertValues(
            magcache=ratios, teacache={form: self._polynomial(expert, form) for form in FORMS}
        )

    def _polynomial(self, expert: Expert, form: Form) -> Polynomial:
        distances = self._distances[expert][form]
        changes = self._changes[expert]
        inputs = np.array([distances[index] for index, _ in changes], dtype=np.float64)
        if len(np.unique(inputs)) <= DEGREE:
            raise ConfigError(
                f"{len(distances)} steps of the {expert} transformer are too few to calibrate",
                hint=f"give num_steps {DEGREE + 2} or more at each expert, best those you use",
            )
        # In units of the largest distance: fourth powers of small numbers would fit badly.
        largest = float(inputs.max())
        fit = np.polyfit(inputs / largest, [change for _, change in changes], DEGREE)
        powers = np.arange(DEGREE, -1, -1)
        return Polynomial(
            coefficients=tuple(float(value) for value in fit / largest**powers),
            lowest=float(inputs.min()),
            highest=largest,
        )
