from __future__ import annotations

import tomllib
from typing import Any

import tomlkit
from hypothesis import given
from hypothesis import strategies as st

from trainer.contract.toml_lines import key_lines, locate

TEXT = '''
name = "x"  # [not.a.table]
[training]
seed = 7
"quoted key" = 1

[dataset.general]
resolution = [
  480,  # ]
  832,
]
text = """
[fake]
seed = 9
"""
[[techniques]]
name = "a"
[[techniques]]
  name = "b"
[techniques.inner]
deep.key = 3
'''


def test_known_lines() -> None:
    lines = key_lines(TEXT)
    assert lines["name"] == 2
    assert lines["training"] == 3
    assert lines["training.seed"] == 4
    assert lines["training.quoted key"] == 5
    assert lines["dataset.general.resolution"] == 8
    assert lines["dataset.general.text"] == 12
    assert lines["techniques[0].name"] == 17
    assert lines["techniques[1].name"] == 19
    assert lines["techniques[1].inner.deep.key"] == 21
    assert "fake" not in lines
    assert "fake.seed" not in lines


def test_locate_falls_back_to_the_closest_parent() -> None:
    lines = {"techniques[1]": 5, "training": 2}
    assert locate("techniques[1].weight", lines) == 5
    assert locate("training.a.b", lines) == 2
    assert locate("optimizer.kind", lines) is None


SCALARS = st.one_of(
    st.integers(-5, 5),
    st.booleans(),
    st.text(st.characters(codec="utf-8", exclude_categories=["C"])),
)
VALUES = st.one_of(SCALARS, st.lists(SCALARS, max_size=3))
KEYS = st.from_regex(r"[a-z][a-z0-9_-]{0,6}", fullmatch=True)


@given(
    st.dictionaries(KEYS, VALUES, max_size=4),
    st.dictionaries(KEYS, st.dictionaries(KEYS, VALUES, min_size=1, max_size=4), max_size=3),
    st.lists(st.dictionaries(KEYS, VALUES, max_size=3), max_size=3),
)
def test_every_key_is_found_on_the_line_that_defines_it(
    top: dict[str, Any], tables: dict[str, Any], array: list[dict[str, Any]]
) -> None:
    content: dict[str, Any] = {**top, **tables, "list-of-tables": array}
    text = tomlkit.dumps(content)
    assert tomllib.loads(text) == content
    rows = text.splitlines()
    lines = key_lines(text)
    expected = [*top.keys() - tables.keys()]
    expected += [f"{name}.{key}" for name, table in tables.items() for key in table]
    expected += [f"list-of-tables[{i}].{key}" for i, table in enumerate(array) for key in table]
    if array or "list-of-tables" not in top:
        for key in expected:
            row = rows[lines[key] - 1]
            assert row.partition("=")[0].strip().strip('"') == key.rpartition(".")[2]
