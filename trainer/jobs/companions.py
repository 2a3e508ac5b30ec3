"""Adapters that are put on the base and not trained: `[[adapter.frozen]]`."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.adapters import load_adapter
from trainer.adapters.apply import attach, fitting_modules
from trainer.contract.config import FrozenAdapter, RunConfig
from trainer.contract.errors import MenmaError, Problem
from trainer.contract.lora_keys import Expert
from trainer.contract.memory_model.weights import linear_shapes
from trainer.contract.variants import TransformerConfig
from trainer.data.fingerprint import model_identity
from trainer.models.wan.transformer import WanTransformer


def attach_companions(
    config: RunConfig, transformer: WanTransformer, expert: Expert | None
) -> None:
    """Put the config's frozen adapters on a transformer, for good.

    Args:
        config: of the run.
        transformer: with nothing else on it yet.
        expert: which one of Wan 2.2 it is; None: a model without experts.

    Raises:
        ModelFileError: one cannot be read, or is for another model.
    """
    for companion in config.adapter.companions(expert):
        adapter = load_adapter(companion.path, expert=companion.expert or expert)
        attach(transformer, adapter, companion.strength)


def companion_problems(
    config: RunConfig, shape: TransformerConfig, expert: Expert | None
) -> Iterator[Problem]:
    """Yield which frozen adapters cannot be put on a transformer of this shape.

    Files that do not exist are told elsewhere.
    """
    shapes = {name: (outputs, inputs) for name, (inputs, outputs) in linear_shapes(shape).items()}
    for index, companion in enumerate(config.adapter.frozen):
        if companion.expert not in (None, expert) or not companion.path.exists():
            continue
        try:
            adapter = load_adapter(companion.path, expert=companion.expert or expert)
            fitting_modules(shapes, adapter)
        except MenmaError as error:
            yield Problem(error.message, f"adapter.frozen[{index}].path", hint=error.hint)


def companion_facts(companions: tuple[FrozenAdapter, ...]) -> list[str]:
    """Return what identifies them: contents and strengths, in their order.

    Raises:
        ModelFileError: one cannot be read.
    """
    return [f"{model_identity(one.path)}*{one.strength:g}" for one in companions]
