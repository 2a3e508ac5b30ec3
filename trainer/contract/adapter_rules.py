"""What goes with what in `[adapter]`, and what of it the files say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from trainer.contract.config import RunConfig
from trainer.contract.errors import Problem
from trainer.contract.targets import FROM_WEIGHTS
from trainer.contract.variants import VARIANTS

_CHOICES = ("targets", "include", "exclude", "rank_pattern", "factor", "decompose_both")
_DROPOUTS = ("dropout", "rank_dropout", "module_dropout")


def adapter_rule(config: RunConfig) -> Iterator[Problem]:
    """Yield where options of the adapter and the rest of the config exclude one another."""
    options = config.adapter.options("kind")
    yield from _start(options)
    if options.get("scale_weight_norms") is not None and config.distributed.zero_stage:
        yield Problem(
            "the bound changes weights after a step, and ZeRO steps on copies of its own",
            "adapter.scale_weight_norms",
            hint="set distributed.zero_stage = 0, or leave it out",
        )
    known = VARIANTS.get(config.model.variant)
    if known is not None and not known.experts:
        for index, companion in enumerate(config.adapter.frozen):
            if companion.expert is not None:
                yield Problem(
                    f"only Wan 2.2 A14B has experts, variant is {known.name!r}",
                    f"adapter.frozen[{index}].expert",
                    hint="leave it out",
                )


def adapter_files(config: RunConfig) -> Iterator[tuple[str, Path]]:
    """Yield the files that `[adapter]` names, each with its key."""
    start = config.adapter.options("kind").get("init_from")
    if start is not None:
        yield "adapter.init_from", Path(start)
    for index, companion in enumerate(config.adapter.frozen):
        yield f"adapter.frozen[{index}].path", companion.path


def _start(options: dict[str, object]) -> Iterator[Problem]:
    """Yield what does not go with how the weights begin."""
    if options.get("rank") == FROM_WEIGHTS:
        for key in _CHOICES:
            if options.get(key) not in (None, False, (), {}, "all"):
                yield Problem(
                    "with rank = from_weights the layers and their shapes are those of the file",
                    f"adapter.{key}",
                    hint="leave it out, or give adapter.rank as a number",
                )
    if not str(options.get("init", "")).startswith("pissa"):
        return
    if options.get("init_from") is not None:
        yield Problem(
            "the weights would begin twice, from the file and from the base's principal part",
            "adapter.init",
            hint="leave out adapter.init, or adapter.init_from",
        )
    for key in _DROPOUTS:
        if options.get(key):
            yield Problem(
                "PiSSA trains the principal part of the base itself; dropping some of it takes it "
                "from the base",
                f"adapter.{key}",
                hint='set it to 0, or adapter.init = "kaiming"',
            )
    if options.get("scale_weight_norms") is not None:
        yield Problem(
            "PiSSA's update is the difference of two products, which scaling one does not bound",
            "adapter.scale_weight_norms",
            hint='leave it out, or set adapter.init = "kaiming"',
        )
