"""What is wrong with a dataset's keys, in words for people."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from trainer.contract.errors import Problem
from trainer.contract.options import Options
from trainer.contract.registry import nearest

M = TypeVar("M", bound=Options)

UNSUPPORTED_KEYS = {
    "no_resize_control": "control images of other models",
    "control_resolution": "control images of other models",
    "multiple_target": "several target images per item",
    "fp_latent_window_size": "FramePack",
    "fp_1f_clean_indices": "one-frame training",
    "fp_1f_target_index": "one-frame training",
    "fp_1f_no_post": "one-frame training",
    "num_timestep_buckets": "timestep buckets per dataset",
}
"""Keys of musubi-tuner that Menma knows and does not support, with what they are for."""
OTHER_NAMES = {
    "is_reg": "set loss_weight of the source: the weight of its items in the loss",
    "prior_loss_weight": "set loss_weight of the regularisation sources",
    "caption_dropout_rate": "its name here is caption_dropout",
    "mask_path": "its name here is mask_directory",
    "shuffle_caption": "its name here is shuffle_tags",
    "keep_tokens": "its name here is keep_tags",
    "caption_separator": "its name here is tag_separator",
}
"""Keys of other trainers, and what does the same here."""
SENTENCE = "sentence"
"""Type of the errors whose text needs no value after it."""


def sentence(text: str) -> PydanticCustomError:
    """Return an error for a validator to raise, whose text is told as it is."""
    return PydanticCustomError(SENTENCE, "{text}", {"text": text})


def explain_key(key: str) -> str | None:
    """Say what is the matter with a key that other trainers know; None: nothing known of it."""
    if key in UNSUPPORTED_KEYS:
        return f"{key} ({UNSUPPORTED_KEYS[key]}) is a key of musubi-tuner that Menma lacks so far"
    if key in OTHER_NAMES:
        return f"{key} is a key of other trainers: {OTHER_NAMES[key]}"
    return None


def with_explanations(
    model: type[M],
    values: Any,
    handler: Callable[[Any], M],
    explain: Callable[[str], str | None],
) -> M:
    """Validate; keys that `explain` has a sentence for get it instead of "unknown key"."""
    if not isinstance(values, Mapping):
        return handler(values)
    explained = {key: text for key in values if (text := explain(str(key)))}
    if not explained:
        return handler(values)
    lines = [
        InitErrorDetails(type=sentence(text), loc=(key,), input=values[key])
        for key, text in explained.items()
    ]
    try:
        handler({key: value for key, value in values.items() if key not in explained})
    except ValidationError as error:
        lines += [
            InitErrorDetails(
                type=PydanticCustomError(item["type"], "{text}", {"text": item["msg"]}),
                loc=tuple(item["loc"]),
                input=item["input"],
            )
            for item in error.errors(include_url=False)
        ]
    raise ValidationError.from_exception_data(model.__name__, lines)


def problems_of(
    error: ValidationError,
    *,
    file: Path | None,
    prefix: str,
    sources: str,
    known: Mapping[str, Sequence[str]],
) -> list[Problem]:
    """Return a problem for each error of `DatasetConfig`.

    Args:
        error: what pydantic raised.
        file: named in the problems.
        prefix: put before the keys, e.g. `dataset.`.
        sources: what the user calls the list of sources.
        known: keys of `sources` and of `general`, for "did you mean".
    """
    problems = []
    for item in error.errors(include_url=False):
        loc = [part for part in item["loc"] if not str(part).startswith("function-")]
        hint = ""
        if item["type"] == "extra_forbidden":
            hint = nearest(str(loc[-1]), known.get(str(loc[0]), ("general", "datasets")))
        elif item["type"] == "no_sources":
            hint = f"add a [[{prefix}{sources}]]"
        problems.append(
            Problem(_message(item), key=prefix + _key(loc, sources), file=file, hint=hint)
        )
    return problems


def _key(loc: list[int | str], sources: str) -> str:
    text = ""
    for part in loc:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part}" if text else (sources if part == "sources" else part)
    return text


def _message(item: Any) -> str:
    if item["type"] == "extra_forbidden":
        return "unknown key"
    if item["type"] in {SENTENCE, "no_sources"}:
        return str(item["msg"])
    value = repr(item["input"])
    if len(value) > 80:
        value = value[:77] + "..."
    return f"{item['msg']}, not {value}"
