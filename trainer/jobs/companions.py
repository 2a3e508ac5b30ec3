"""Adapters that are put on the base and not trained: `[[adapter.frozen]]`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from trainer.adapters import load_adapter
from trainer.adapters.apply import attach, fitting_modules
from trainer.adapters.base import AdapterFile
from trainer.adapters.difference import fitting_differences, on_modules, shown_in_blocks
from trainer.adapters.rank_mask import METADATA_KEY
from trainer.contract.config import FrozenAdapter, RunConfig
from trainer.contract.errors import MenmaError, Problem
from trainer.contract.expert_turns import EXPERTS
from trainer.contract.memory_model.weights import linear_shapes, parameter_sizes
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
        chosen = companion.expert or expert
        adapter = load_adapter(companion.path, expert=chosen, differences=True)
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
            chosen = companion.expert or expert
            adapter = load_adapter(companion.path, expert=chosen, differences=True)
            fitting_modules(shapes, adapter)
            fitting_differences(_parameter_shapes(shape, adapter), adapter)
        except MenmaError as error:
            yield Problem(error.message, key, hint=error.hint)
            continue
        held = next(iter(on_modules(adapter.differences, biases=False)), None)
        if config.distributed.zero_stage == 3 and held is not None:
            yield Problem(
                f"{companion.path} changes parameters of {held}, which ZeRO-3 gathers later than "
                "they are changed",
                key,
                hint="set distributed.zero_stage to 2, or merge the file into the model "
                "(`menma merge`)",
            )
        shown = shown_in_blocks(adapter)
        if config.memory.compile_blocks and shown is not None:
            yield Problem(
                f"{companion.path} holds {shown}, a whole difference that compiled blocks do not "
                "take (memory.compile_blocks)",
                key,
                hint="set memory.compile_blocks to false, or merge the file into the model "
                "(`menma merge`)",
            )
        if config.adapter.kind == "dora" and METADATA_KEY in adapter.metadata:
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


def _parameter_shapes(shape: TransformerConfig, adapter: AdapterFile) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parameters that a file changes; of sizes alone where they differ."""
    sizes = parameter_sizes(shape)
    return {
        name: tuple(tensor.shape) if tensor.numel() == sizes[name] else (sizes[name],)
        for name, tensor in adapter.differences.items()
        if name in sizes
    }


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
