"""Sample prompts of musubi-tuner and Takenoko: text with flags, TOML, JSON, or tables inline."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from app.domain.importing import values as v
from app.domain.importing.tables import Keys
from trainer.contract.prompt_keys import FLAGS
from trainer.contract.prompts import split_prompt_line

FIELDS: Mapping[str, str] = {
    "prompt": "prompt",
    "text": "prompt",
    "width": "width",
    "height": "height",
    "frame_count": "num_frames",
    "frames": "num_frames",
    "seed": "seed",
    "sample_steps": "num_steps",
    "step": "num_steps",
    "steps": "num_steps",
    "cfg_scale": "guidance_scale",
    "discrete_flow_shift": "flow_shift",
    "flow_shift": "flow_shift",
    "negative_prompt": "negative_prompt",
    "negative": "negative_prompt",
    "image_path": "image",
    "end_image_path": "last_image",
    "control_video_path": "control",
    "control_path": "control",
}
"""Key of a table of prompts -> key of `[[sampling.prompts]]`."""
DEFAULTS: Mapping[str, Any] = {
    "width": 256,
    "height": 256,
    "num_frames": 1,
    "num_steps": 20,
    "guidance_scale": 5.0,
    "negative_prompt": "",
}
"""What counts there where a prompt says nothing. Their flow shift, 14.5, is not taken: it is that
of another model, and no good for Wan."""
_CONVERT: Mapping[str, Any] = {
    "width": v.whole, "height": v.whole, "num_frames": v.whole, "num_steps": v.whole,
    "seed": v.whole, "guidance_scale": v.number, "flow_shift": v.number,
}  # fmt: skip
_INLINE = re.compile(r"sample_prompts\[(\d+)\]\.(.+)")


def prompts(keys: Keys) -> None:
    """Write the prompts into the config, with what counts there where one says nothing."""
    inline = _inline(keys)
    if inline:
        for index, fields in enumerate(inline):
            _write(keys, index, fields)
        return
    name = keys.get("sample_prompts")
    if not isinstance(name, str) or not name:
        return
    path = Path(keys.file_of(name)[0])
    try:
        found, lost = _read(path)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        keys.put(
            "sample_prompts",
            "sampling.prompts_file",
            str(path),
            note=f"it could not be read ({reason}), so its prompts are not listed here",
        )
        return  # fmt: skip
    for index, fields in enumerate(found):
        _write(keys, index, fields)
    note = f"{len(found)} prompts, with musubi-tuner's defaults but for its flow shift"
    if lost:
        note += f"; without {', '.join(sorted(lost))}, which Menma lacks"
    keys.done("sample_prompts", note, "sampling.prompts[0].prompt" if found else "")


def _inline(keys: Keys) -> list[dict[str, Any]]:
    tables: dict[int, dict[str, Any]] = {}
    for key in keys.values:
        match = _INLINE.fullmatch(key)
        if match is None:
            continue
        index, name = int(match[1]), match[2]
        fields = tables.setdefault(index, {})
        field = FIELDS.get(name)
        if field is None or field in fields:
            keys.lacks(key, "Menma's prompts have no such key")
            continue
        if (converted := keys.read(key, _CONVERT.get(field, v.text))) is not None:
            fields[field] = converted
            keys.done(key, "", f"sampling.prompts[{index}].{field}")
            keys.reported[key].new_value = converted
    return [tables[index] for index in sorted(tables)]


def _read(path: Path) -> tuple[list[dict[str, Any]], set[str]]:
    """Return the fields of all prompts of a file, and the flags that Menma lacks."""
    text = path.read_bytes().decode("utf-8-sig")
    lost: set[str] = set()
    if path.suffix.lower() == ".json":
        tables = json.loads(text)
    elif path.suffix.lower() == ".toml":
        tables = list(_toml_tables(tomllib.loads(text)))
    else:
        return [_of_line(line, lost) for line in _lines(text)], lost
    if not isinstance(tables, list):
        raise TypeError("a list of prompts is expected")
    found = []
    for table in tables:
        fields = {"prompt": table} if isinstance(table, str) else table
        if not isinstance(fields, dict):
            raise TypeError("a prompt is a text or a table")
        lost |= {name for name in fields if name not in FIELDS}
        found.append(_converted({FIELDS[n]: value for n, value in fields.items() if n in FIELDS}))
    return found, lost


def _toml_tables(content: Mapping[str, Any]) -> Iterator[Any]:
    table = content.get("prompt", content.get("prompts", []))
    if isinstance(table, dict):
        common = {key: value for key, value in table.items() if key != "subset"}
        for part in table.get("subset", [{}]):
            yield {**common, **part}
    else:
        yield from table


def _lines(text: str) -> Iterator[str]:
    for line in text.splitlines():
        if line.strip() and not line.strip().startswith("#"):
            yield line


def _of_line(line: str, lost: set[str]) -> dict[str, Any]:
    prompt, flags = split_prompt_line(line)
    lost |= {f"--{flag}" for flag, _ in flags if flag not in FLAGS}
    return _converted(
        {"prompt": prompt, **{FLAGS[flag]: value for flag, value in flags if flag in FLAGS}}
    )


def _converted(fields: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: _CONVERT.get(key, v.text)(value) for key, value in fields.items()}
    return {key: value for key, value in found.items() if value is not None}


def _write(keys: Keys, index: int, fields: Mapping[str, Any]) -> None:
    complete = {**DEFAULTS, **fields}
    complete["num_frames"] = (complete["num_frames"] - 1) // 4 * 4 + 1
    for side in ("width", "height"):
        complete[side] = complete[side] // 16 * 16
    if not str(complete.get("prompt") or ""):
        complete["prompt"] = ""
    for field, value in complete.items():
        keys.draft.values[f"sampling.prompts[{index}].{field}"] = value
