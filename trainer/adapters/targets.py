"""Which linear layers an adapter is put on."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from torch import nn

from trainer.adapters.adapter_linear import AdapterLinear
from trainer.adapters.formats.names import canonical_name
from trainer.contract.errors import ConfigError, Problem
from trainer.contract.registry import nearest

_BLOCK_LINEAR = re.compile(
    r"blocks\.\d+\.(?:(?:self_attn|cross_attn)\.[qkvo]|cross_attn\.[kv]_img|ffn\.[02])"
)


def linear_layers(transformer: nn.Module) -> dict[str, nn.Module]:
    """Return every linear layer that LoRA files have a name for, by canonical name.

    A wrapped layer counts as its outermost wrapper; a quantised one is linear when it has
    `in_features` and `out_features`.
    """
    found: dict[str, nn.Module] = {}
    wrapped: tuple[str, ...] = ()
    for name, module in transformer.named_modules():
        if name.startswith(wrapped) and wrapped:
            continue
        if isinstance(module, AdapterLinear):
            wrapped = (*wrapped, f"{name}.")
        if canonical_name(name) == name and _is_linear(module):
            found[name] = module
    return found


def select_targets(
    names: Iterable[str], include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> tuple[str, ...]:
    """Return the names of the layers to adapt, in the order given.

    The start is every linear layer of the blocks' attention and feed-forward. `exclude` takes
    layers away, `include` brings layers in, even excluded ones and those outside the blocks; so
    "only blocks 0 to 9" is exclude `.*`, include `blocks\\.\\d\\..*`. Patterns are regular
    expressions that must match a whole name such as `blocks.3.self_attn.q`.

    Raises:
        ConfigError: a pattern is invalid or matches no layer, or nothing is left; every problem.
    """
    names = tuple(names)
    problems: list[Problem] = []
    included = _matcher("include", include, names, problems)
    excluded = _matcher("exclude", exclude, names, problems)
    if problems:
        raise ConfigError(problems=problems)
    chosen = tuple(
        name
        for name in names
        if included(name) or (_BLOCK_LINEAR.fullmatch(name) and not excluded(name))
    )
    if not chosen:
        raise ConfigError(
            "adapter.exclude leaves no layer to train",
            hint="add adapter.include for the layers that shall be trained",
        )
    return chosen


def _matcher(
    key: str, patterns: Sequence[str], names: tuple[str, ...], problems: list[Problem]
) -> Callable[[str], bool]:
    compiled: list[re.Pattern[str]] = []
    for pattern in patterns:
        try:
            regex = re.compile(pattern)
        except re.error as error:
            problems.append(
                Problem(f"{pattern!r} is not a regular expression: {error}", f"adapter.{key}")
            )
            continue
        if not any(regex.fullmatch(name) for name in names):
            problems.append(
                Problem(
                    f"{pattern!r} matches none of the {len(names)} linear layers",
                    f"adapter.{key}",
                    hint="it must match a whole name; " + nearest(pattern, names[:200]),
                )
            )
        compiled.append(regex)
    return lambda name: any(regex.fullmatch(name) for regex in compiled)


def _is_linear(module: nn.Module) -> bool:
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return all(isinstance(size, int) for size in sizes)
