"""Event lines: written whole, read incrementally, damaged lines skipped and counted."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.contract.errors import DiskError
from trainer.contract.events import MAX_LINE_BYTES, EventReader, EventWriter, encode
from trainer.contract.files import write_json

VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)
    ),
    max_leaves=8,
)


def finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    return [finite(part) for part in value] if isinstance(value, list) else value


@given(VALUES)
def test_any_value_becomes_one_line_of_strict_json(value: Any) -> None:
    line = encode("log", message=value)
    assert line.endswith("\n")
    assert "\n" not in line[:-1]

    def refuse(name: str) -> None:
        raise AssertionError(name)

    event = json.loads(line, parse_constant=refuse)
    assert event["message"] == finite(value)
    assert event["v"] == 1


def test_names_of_files_that_are_not_utf8_survive(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.mp4")
    line = encode("warning", message="too short", file=name)
    assert json.loads(line.encode("utf-8"))["file"] == name
    write_json(tmp_path / "index.json", {name: 1})
    assert json.loads((tmp_path / "index.json").read_text(encoding="utf-8")) == {name: 1}


def test_unknown_types_and_huge_events_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown event type"):
        encode("stpe")
    with pytest.raises(ValueError, match="larger than"):
        encode("log", message="x" * MAX_LINE_BYTES)


def test_reader_gets_each_event_once_and_waits_for_unfinished_lines(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    reader, write = EventReader(path), EventWriter(path)
    assert list(reader.read()) == []
    write("log", message="a")
    assert [event["message"] for event in reader.read()] == ["a"]
    with path.open("ab") as file:
        file.write(b'{"type": "log", "mess')
    assert list(reader.read()) == []
    write("log", message="b")  # a new writer after a crash: the half line is closed first
    assert [event["message"] for event in reader.read()] == ["b"]
    assert reader.bad_lines == 1


def test_reader_starts_over_when_the_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    reader, write = EventReader(path), EventWriter(path)
    write("log", message="a")
    write("log", message="b")
    assert len(list(reader.read())) == 2
    path.unlink()
    write("log", message="c")
    assert [event["message"] for event in reader.read()] == ["c"]


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(DiskError, match="no space left"):
        EventWriter(tmp_path / "events.jsonl")("log", message="x")
