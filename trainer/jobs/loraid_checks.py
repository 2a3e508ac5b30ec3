"""What a config's slot needs of the weight files, and what is said of it when a training starts."""

from __future__ import annotations

from collections.abc import Collection

from trainer.adapters.targets import select_targets
from trainer.contract.config import RunConfig
from trainer.contract.errors import ConfigError, MenmaError, Problem
from trainer.contract.loraid import LoraidOptions, in_slot, in_words
from trainer.contract.loraid_rules import loraid_options
from trainer.contract.memory_model.weights import block_layers, outer_layers
from trainer.contract.variants import VARIANTS, TransformerConfig
from trainer.io.mapped_load import open_weights
from trainer.models.wan.detect import recognise


def slot_problems(config: RunConfig) -> list[Problem]:
    """Return what is wrong with `[adapter.loraid]` for the model that is trained.

    The number of blocks is read from the headers of the weights; where no file is named, that of
    `model.variant` counts. Files that cannot be read are told elsewhere.
    """
    options = loraid_options(config)
    if options is None:
        return []
    model = config.model
    files = [path for path in (model.transformer, model.transformer_high_noise) if path is not None]
    shapes = []
    for path in (path for path in files if path.exists()):
        try:
            shapes.append(recognise(open_weights(path), "auto", dict(model.shape)).config)
        except MenmaError:
            continue
    if not files and model.variant in VARIANTS:
        shapes = [VARIANTS[model.variant].transformer]
    found = (problem for shape in shapes for problem in _problems(config, options, shape))
    return list(dict.fromkeys(found))


def _problems(
    config: RunConfig, options: LoraidOptions, shape: TransformerConfig
) -> tuple[Problem, ...]:
    inner = block_layers(shape)
    names = [f"blocks.{index}.{name}" for index in range(shape.num_layers) for name in inner]
    names += outer_layers(shape)
    chosen = config.adapter.options("kind")
    patterns = (tuple(chosen.get(key, ())) for key in ("include", "exclude"))
    try:
        targets = select_targets(names, *patterns)
    except ConfigError:
        return ()  # the patterns' own faults
    try:
        in_slot(targets, names, options)
    except ConfigError as error:
        return error.problems
    return ()


def slot_in_words(config: RunConfig, modules: Collection[str], num_parameters: int) -> str | None:
    """Return what is trained of the network, in words; None where there is no slot.

    Args:
        config: of the run.
        modules: canonical names of the layers that are trained.
        num_parameters: trained in them.
    """
    options = loraid_options(config)
    if options is None:
        return None
    return (
        f"LORAID slot {options.slot} of {options.slots} ({options.granularity}, "
        f"{options.allocation}): {num_parameters:,} parameters in {len(modules)} layers: "
        f"{in_words(modules)}"
    )
