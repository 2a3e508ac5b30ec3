"""Hostfiles and what the config says beside them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.contract.config import load_config
from trainer.contract.config_rules import check_files
from trainer.contract.errors import ConfigError
from trainer.contract.hostfile import Host, parse_hostfile, read_hostfile, world_size_of

FILE = Path("hosts")
NAMES = st.from_regex(r"[a-z0-9][a-z0-9.:_-]{0,20}", fullmatch=True)
SPACE = st.text(" \t", min_size=1, max_size=3)
COMMENT = st.text(st.characters(exclude_characters="\n", codec="utf-8"), max_size=10)


@st.composite
def hostfiles(draw) -> tuple[str, list[tuple[str, int, int]]]:
    """Return a text, and the name, slots and line of each host in it."""
    names = draw(st.lists(NAMES, min_size=1, max_size=8, unique=True))
    lines: list[str] = []
    expected = []
    for name in names:
        for _ in range(draw(st.integers(0, 2))):
            lines.append(draw(st.one_of(st.just(""), SPACE, COMMENT.map(lambda text: f"#{text}"))))
        slots = draw(st.integers(1, 1024))
        tail = draw(st.one_of(st.just(""), st.just("\r"), COMMENT.map(lambda text: f" # {text}")))
        lines.append(f"{draw(st.one_of(st.just(''), SPACE))}{name}{draw(SPACE)}slots={slots}{tail}")
        expected.append((name, slots, len(lines)))
    return "\n".join(lines), expected


@given(hostfiles())
def test_what_is_written_is_read(case):
    text, expected = case
    assert [(h.name, h.slots, h.line) for h in parse_hostfile(text, FILE)] == expected


@given(st.text(max_size=80))
def test_any_text_is_read_or_refused_with_a_place(text):
    try:
        hosts = parse_hostfile(text, FILE)
    except ConfigError as error:
        num_lines = text.count("\n") + 1
        for problem in error.problems:
            assert problem.key or (problem.file == FILE and 1 <= problem.line <= num_lines)
    else:
        assert hosts
        assert all(host.slots >= 1 and not host.name.startswith("-") for host in hosts)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "hosts names no machine"),
        ("# nobody\n\n", "hosts names no machine"),
        ("node1", "hosts:1: node1 lacks its number of processes"),
        ("a slots=1\nb slots=x", "hosts:2: slots is 'x'"),
        ("a slots=0", "hosts:1: slots is '0'"),
        ("a slots=-1", "slots is '-1'"),
        ("a slots=", "slots is ''"),
        ("a slots=99999999999999999999", "not a number from 1 to 1024"),
        ("a slots=2 max_slots=4", "hosts:1: cannot use 'max_slots=4'"),
        ("a slots=2 slots=2", "cannot use 'slots=2'"),
        ("a 2", "cannot use '2'"),
        ("a slots=1\n\n#x\na slots=1", "hosts:4: a is in line 1 already"),
        ("-oProxyCommand=x slots=1", "no name or address of a machine"),
        ("user@a slots=1", "'user@a' is no name"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(text, words):
    with pytest.raises(ConfigError) as caught:
        parse_hostfile(text, FILE)
    assert words in str(caught.value)


def test_every_wrong_line_is_told_at_once():
    with pytest.raises(ConfigError) as caught:
        parse_hostfile("a\nb slots=1\nc slots=z", FILE)
    assert [problem.line for problem in caught.value.problems] == [1, 3]


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        read_hostfile(tmp_path / "hosts")
    with pytest.raises(ConfigError, match="cannot read"):
        read_hostfile(tmp_path)
    (tmp_path / "hosts").write_bytes(b"\xef\xbb\xbfa slots=2\n")
    assert read_hostfile(tmp_path / "hosts") == (Host("a", 2, 1),)


def config_of(tmp_path: Path, hosts: str | None, more: str = ""):
    if hosts is not None:
        (tmp_path / "hosts").write_text(hosts)
    path = tmp_path / "c.toml"
    path.write_text(
        f'name = "x"\n[distributed]\nhostfile = "{tmp_path}/hosts"\n{more}\n', encoding="utf-8"
    )
    return load_config(path)


def problems(config) -> list[str]:
    return [str(p) for p in check_files(config, "train") if "hosts" in str(p)]


def test_all_machines_count(tmp_path):
    config = config_of(tmp_path, "a slots=4\nb slots=4\n")
    assert world_size_of(config, 1) == 8
    assert problems(config) == []
    alone = load_config(_written(tmp_path / "d.toml", 'name = "x"'))
    assert world_size_of(alone, 3) == 3
    two = load_config(tmp_path / "d.toml", ["distributed.num_processes=2"])
    assert world_size_of(two, 3) == 2


def test_the_estimate_counts_all_machines(tmp_path):
    from trainer.contract.memory_model.workload import workload_of

    more = """zero_stage = 2
[model]
variant = "wan2.1-t2v-1.3b"
[dataset.general]
resolution = [64, 64]
[[dataset.sources]]
video_directory = "clips"
target_frames = [5]
"""
    assert workload_of(config_of(tmp_path, "a slots=4\nb slots=4\n", more)).world_size == 8


def test_unequal_machines_are_refused(tmp_path):
    (problem,) = problems(config_of(tmp_path, "a slots=4\nb slots=2\n"))
    assert "distributed.hostfile: the machines run unequal numbers" in problem
    assert "a has 4, b has 2" in problem
    assert "write slots=2 on every line" in problem


def test_a_missing_or_wrong_file_is_a_problem_of_training_only(tmp_path):
    config = config_of(tmp_path, None)
    (problem,) = problems(config)
    assert "distributed.hostfile: no such file" in problem
    assert not [p for p in check_files(config, "cache") if "hosts" in str(p)]
    (problem,) = problems(config_of(tmp_path, "a"))
    assert problem.startswith(f"{tmp_path}/hosts:1: a lacks its number")


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ('engine = "local"', "distributed.hostfile: the local engine is one process"),
        ("num_processes = 2", "distributed.num_processes: the hostfile says"),
    ],
)
def test_what_contradicts_a_hostfile(tmp_path, more, key):
    with pytest.raises(ConfigError, match=key):
        config_of(tmp_path, "a slots=1\n", more)


def _written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path
