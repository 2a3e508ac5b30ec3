"""Adapters that are put on the base and not trained: `[[adapter.frozen]]`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from trainer.adapters import load_adapter
from trainer.adapters.apply import attach, fitting_modules
from trainer.contract.adapter_start import TLORA_KEY
from trainer.contract.config import FrozenAdapter, RunConfig
from trainer.contract.errors import MenmaError, Problem
from trainer.contract.expert_turns import EXPERTS
from trainer.contract.memory_model.weights import linear_shapes
from trainer.contract.variants import Expert, TransformerConfig
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
        key = f"adapter.frozen[{index}].path"
        try:
            adapter = load_adapter(companion.path, expert=companion.expert or expert)
            fitting_modules(shapes, adapter)
        except MenmaError as error:
            yield Problem(error.message, key, hint=error.hint)
            continue
        if config.adapter.kind == "dora" and TLORA_KEY in adapter.metadata:
            yield Problem(
                f"{companion.path} is a T-LoRA, whose update is another one at each timestep, and "
                "a DoRA measures the weights that it is put on",
                key,
                hint="leave it out, or train an adapter of another kind",
            )
        trained = other_expert(adapter.metadata, expert)
        if companion.expert is None and trained is not None:
            yield Problem(
                f"{companion.path} is for the {trained} expert and would be put on the {expert} "
                "expert, too",
                key,
                hint=f'write {{ path = "…", expert = "{trained}" }} to put it on its own alone, '
                f'or expert = "{expert}" to put it on that one all the same',
            )


def other_expert(metadata: Mapping[str, Any], expert: Expert | None) -> Expert | None:
    """Return the expert that a file says it was trained for, where that is not `expert`.

    None where it is, where the file says none or both, and for a model without experts.
    """
    told = metadata.get("menma.expert")
    return next((one for one in EXPERTS if expert and one == told != expert), None)


def companion_facts(companions: tuple[FrozenAdapter, ...]) -> list[str]:
    """Return what identifies them: contents and strengths, in their order.

    Raises:
        ModelFileError: one cannot be read.
    """
    return [f"{model_identity(one.path)}*{one.strength:g}" for one in companions]
