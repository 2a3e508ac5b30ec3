"""What is wrong with weight files and batches, by headers and counts: told before they are used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from trainer.contract.config import RunConfig
from trainer.contract.errors import ConfigError, MenmaError, Problem, UserError
from trainer.contract.hostfile import world_size_of
from trainer.data.order import Group, step_problem
from trainer.io.mapped_load import open_weights
from trainer.jobs.build import num_processes, technique_problems
from trainer.jobs.components import settle_variant
from trainer.models.wan.image_encoder import check_image_encoder
from trainer.models.wan.text_encoder import check_text_encoder, check_tokenizer

_WEIGHTS = ("transformer", "transformer_high_noise", "vae", "text_encoder", "image_encoder")


def weight_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield which weight files cannot be read; those that do not exist are told elsewhere."""
    for field in _WEIGHTS:
        path: Path | None = getattr(config.model, field)
        if path is None or not path.exists():
            continue
        try:
            open_weights(path)
        except MenmaError as error:
            yield Problem(error.message, f"model.{field}", hint=error.hint)


def variant_problem(config: RunConfig) -> Problem | None:
    """Return why the transformer's file is not what `model.variant` says, or no known model."""
    try:
        settle_variant(config)
    except UserError as error:
        model = config.model
        high = model.transformer is None or model.expert == "high_noise"
        field = "transformer_high_noise" if high and model.transformer_high_noise else "transformer"
        return Problem(error.message, f"model.{field}", hint=error.hint)
    return None


def encoder_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield which encoders, by their headers, are other models, or lack a tokenizer that fits.

    Files that are not there or cannot be read are told elsewhere.
    """
    model = config.model
    if model.text_encoder is not None and model.text_encoder.exists():
        problem = _refusal(check_text_encoder, model.text_encoder, "text_encoder")
        if problem is None and (model.tokenizer is None or model.tokenizer.exists()):
            fits = partial(check_tokenizer, tokenizer=model.tokenizer)
            problem = _refusal(fits, model.text_encoder, "tokenizer")
        if problem is not None:
            yield problem
    if model.image_encoder is not None and model.image_encoder.exists():
        problem = _refusal(check_image_encoder, model.image_encoder, "image_encoder")
        if problem is not None:
            yield problem


def batch_problems(config: RunConfig, groups: Sequence[Group]) -> Iterator[Problem]:
    """Yield what steps and techniques need and these groups of training items do not give."""
    if not groups:
        return  # told already: there is nothing to train on
    try:
        processes = world_size_of(config, num_processes(config))
    except ConfigError:
        return  # told with the hostfile
    problem = step_problem(
        groups,
        # Processes that share clips count as one.
        world_size=max(1, processes // config.distributed.sequence_parallel),
        gradient_accumulation_steps=config.training.gradient_accumulation_steps,
    )
    if problem is not None:
        yield problem
    yield from technique_problems(config, max(group.largest_batch for group in groups))


def _refusal(check: Callable[..., None], path: Path, field: str) -> Problem | None:
    try:
        check(open_weights(path))
    except UserError as error:
        return Problem(error.message, f"model.{field}", hint=error.hint)
    return None
