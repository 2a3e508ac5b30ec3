"""What of a transformer is trained: which parts, with which rank, alpha and learning rate.

The one implementation, for whoever trains and for whoever tells what training takes. No torch:
names of parts and options go in, a plan comes out.

Patterns are regular expressions that must match a whole name such as `blocks.3.self_attn.q`.
`<4-11>` in a pattern stands for any whole number from 4 to 11.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.contract.errors import ConfigError, Problem
from trainer.contract.lora_header import FileLayer
from trainer.contract.loraid import LoraidOptions, in_slot

FROM_WEIGHTS = "from_weights"
"""Value of `rank` that takes modules and ranks from `init_from`."""

_RANGE = re.compile(r"<(\d+)-(\d+)>")
_BLOCK = r"blocks\.\d+\."
_BLOCK_LINEAR = re.compile(
    _BLOCK + r"(?:(?:self_attn|cross_attn)\.[qkvo]|cross_attn\.[kv]_img|ffn\.[02])"
)
PRESETS: dict[str, re.Pattern[str]] = {
    "all": re.compile(r".*"),
    "attention": re.compile(_BLOCK + r"(?:self|cross)_attn\..*"),
    "self_attention": re.compile(_BLOCK + r"self_attn\..*"),
    "cross_attention": re.compile(_BLOCK + r"cross_attn\..*"),
    "ffn": re.compile(_BLOCK + r"ffn\..*"),
}
"""Values of `targets`. An adapter's `all` are the linear layers of the blocks."""

_Spellings = Callable[[str], Iterable[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlan:
    """How one linear layer is trained."""

    rank: int | None = None
    """None: the kind has no rank."""
    alpha: float | None = None
    """None: not given; a kind says what it is then."""
    lr_factor: float = 1.0
    """Multiplies the learning rate."""


def plan_layers(
    names: Iterable[str],
    options: Mapping[str, Any],
    in_file: Mapping[str, FileLayer] | None = None,
) -> dict[str, LayerPlan]:
    """Return the linear layers that an adapter is put on, in the order of `names`.

    The start is what the preset `targets` names of the blocks' linear layers. `exclude` takes
    layers away, `include` brings layers in, even excluded ones and those outside the blocks; so
    "only blocks 0 to 9" is exclude `.*`, include `blocks\\.<0-9>\\..*`. Of several patterns of a
    table that match a layer the first one counts. `loraid` narrows the choice to a slot.

    Args:
        names: of all linear layers of the model.
        options: of the adapter: `targets`, `include`, `exclude`, `rank`, `alpha`, `rank_pattern`,
            `alpha_pattern`, `lr_pattern`, `init_from`, `loraid`; a kind need not have all of them.
        in_file: layers of the file that training starts from, None where there is none.

    Raises:
        ConfigError: a pattern is invalid or matches nothing, nothing is left, or what is chosen
            and what the file holds differ; every problem.
    """
    names = tuple(names)
    problems: list[Problem] = []
    if options.get("rank") == FROM_WEIGHTS:
        chosen = _of_file(names, options, in_file, problems)
        ranks = {name: (in_file or {})[name].rank for name in chosen}
    else:
        chosen = _select(names, options, problems, "linear layers", _BLOCK_LINEAR.fullmatch, _alone)
        rank_of = _table("rank_pattern", options, chosen, problems, _alone)
        rank = options.get("rank")
        ranks = {name: rank_of(name, rank) for name in chosen}
    alpha_of = _table("alpha_pattern", options, chosen, problems, _alone)
    lr_of = _table("lr_pattern", options, chosen, problems, _alone)
    if not problems:
        chosen = _of_slot(chosen, names, options, problems)
    if in_file is not None and not problems:
        problems += _differences({name: ranks[name] for name in chosen}, in_file, options)
    if problems:
        raise ConfigError(problems=problems)
    return {
        name: LayerPlan(
            rank=ranks[name],
            alpha=alpha_of(name, options.get("alpha")),
            lr_factor=lr_of(name, 1.0),
        )
        for name in chosen
    }


def _of_slot(
    chosen: tuple[str, ...],
    names: tuple[str, ...],
    options: Mapping[str, Any],
    problems: list[Problem],
) -> tuple[str, ...]:
    loraid = options.get("loraid")
    if loraid is None:
        return chosen
    try:
        return in_slot(chosen, names, LoraidOptions.model_validate(loraid))
    except ConfigError as error:
        problems += error.problems
        return ()


def plan_parameters(names: Iterable[str], options: Mapping[str, Any]) -> dict[str, float]:
    """Return factors of the learning rate of the model's own parameters that are trained.

    A pattern matches a parameter when it matches its name (`blocks.3.norm3.weight`) or that of a
    module it is in (`blocks.3.norm3`, `blocks.3`). `targets`, `include` and `exclude` choose as in
    `plan_layers`, where `all` is the whole model.

    Args:
        names: of all parameters of the model.
        options: `targets`, `include`, `exclude`, `lr_pattern`.

    Raises:
        ConfigError: a pattern is invalid or matches nothing, or nothing is left; every problem.
    """
    names = tuple(names)
    problems: list[Problem] = []
    chosen = _select(names, options, problems, "parameters", lambda _: True, _with_parents)
    lr_of = _table("lr_pattern", options, chosen, problems, _with_parents)
    if problems:
        raise ConfigError(problems=problems)
    return {name: lr_of(name, 1.0) for name in chosen}


def _select(
    names: tuple[str, ...],
    options: Mapping[str, Any],
    problems: list[Problem],
    what: str,
    usual: Callable[[str], object],
    spellings: _Spellings,
) -> tuple[str, ...]:
    preset = PRESETS[options.get("targets", "all")]
    matchers = []
    for key in ("include", "exclude"):
        found = [
            _pattern(f"adapter.{key}", text, names, what, problems, spellings)
            for text in options.get(key, ())
        ]
        matchers.append([pattern for pattern in found if pattern is not None])
    included, excluded = matchers
    chosen = tuple(
        name
        for name in names
        if _any(included, name, spellings)
        or (usual(name) and preset.fullmatch(name) and not _any(excluded, name, spellings))
    )
    if not chosen and not problems:
        problems.append(
            Problem(
                f"leaves none of the {len(names)} {what} to train",
                "adapter.exclude" if options.get("exclude") else "adapter.targets",
                hint="add adapter.include for what shall be trained",
            )
        )
    return chosen


def _of_file(
    names: tuple[str, ...],
    options: Mapping[str, Any],
    in_file: Mapping[str, FileLayer] | None,
    problems: list[Problem],
) -> tuple[str, ...]:
    if in_file is None:
        problems.append(
            Problem(
                "from_weights takes the ranks of a file, and none is given",
                "adapter.rank",
                hint="set adapter.init_from, or a number",
            )
        )
        return ()
    foreign = [layer for name, layer in in_file.items() if name not in set(names)]
    if foreign:
        problems.append(
            Problem(
                f"{options.get('init_from')} is for another model: {foreign[0].key} and "
                f"{len(foreign) - 1} more layers are not in this one",
                "adapter.init_from",
                hint="use weights that were trained for this model",
            )
        )
    return tuple(name for name in names if name in in_file)


def _differences(
    ranks: Mapping[str, int | None], in_file: Mapping[str, FileLayer], options: Mapping[str, Any]
) -> Iterator[Problem]:
    """Yield where what is trained and what the file holds are not the same."""
    path, hint = options.get("init_from"), 'set adapter.rank = "from_weights", or train the same'
    if options.get("loraid") is not None:
        hint = "name a file of this slot (`menma lora verify` tells a file's slot)"
    lost = [layer for name, layer in in_file.items() if name not in ranks]
    if lost:
        yield Problem(
            f"{path} holds layers that are not trained and would be lost: {lost[0].key} and "
            f"{len(lost) - 1} more",
            "adapter.init_from",
            hint=hint,
        )
    absent = [name for name in ranks if name not in in_file]
    if absent:
        yield Problem(
            f"{path} lacks {len(absent)} of the {len(ranks)} layers that are trained, e.g. "
            f"{absent[0]}",
            "adapter.init_from",
            hint=hint,
        )
    other = [
        name
        for name, rank in ranks.items()
        if name in in_file and not in_file[name].any_rank and in_file[name].rank != rank
    ]
    if other:
        layer = in_file[other[0]]
        yield Problem(
            f"{path}: {layer.key} has rank {layer.rank}, {ranks[other[0]]} is trained "
            f"({len(other)} of {len(ranks)} layers differ)",
            "adapter.rank",
            hint=hint,
        )


def _table(
    key: str,
    options: Mapping[str, Any],
    names: tuple[str, ...],
    problems: list[Problem],
    spellings: _Spellings,
) -> Callable[[str, Any], Any]:
    """Return what looks a name up in a table of patterns, given the value where none matches."""
    rows: list[tuple[re.Pattern[str], Any]] = []
    for text, value in options.get(key, {}).items():
        pattern = _pattern(
            f"adapter.{key}.{text}", text, names, "trained parts", problems, spellings
        )
        if pattern is not None:
            rows.append((pattern, value))

    def look(name: str, otherwise: Any) -> Any:
        matching = (value for pattern, value in rows if _any([pattern], name, spellings))
        return next(matching, otherwise)

    return look


def _pattern(
    key: str,
    text: str,
    names: tuple[str, ...],
    what: str,
    problems: list[Problem],
    spellings: _Spellings,
) -> re.Pattern[str] | None:
    try:
        pattern = re.compile(_RANGE.sub(_numbers, text))
    except re.error as error:
        problems.append(Problem(f"'{text}' is not a regular expression: {error}", key))
        return None
    if names and not any(_any([pattern], name, spellings) for name in names):
        problems.append(
            Problem(
                f"'{text}' matches none of the {len(names)} {what}",
                key,
                hint="it must match a whole name; " + _like(text, names),
            )
        )
    return pattern


def _numbers(match: re.Match[str]) -> str:
    first, last = int(match[1]), int(match[2])
    if first > last or last > 9999:
        raise re.error(f"{match[0]} is no range of blocks")
    return f"(?:{'|'.join(map(str, range(first, last + 1)))})"


def _like(text: str, names: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(text, names, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"one is {names[len(names) // 2]!r}"


def _any(patterns: Sequence[re.Pattern[str]], name: str, spellings: _Spellings) -> bool:
    return any(pattern.fullmatch(spelling) for spelling in spellings(name) for pattern in patterns)


def _alone(name: str) -> tuple[str]:
    return (name,)


def _with_parents(name: str) -> Iterator[str]:
    while name:
        yield name
        name = name.rpartition(".")[0]
