"""Edits of a TOML text: judged by tomllib, tomlkit and the lines that stay as they were."""

from __future__ import annotations

import random
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomlkit
from hypothesis import given, settings
from hypothesis import strategies as st

from app.domain.config_document import ConfigDocument
from app.domain.toml_edits import key_of, path_of
from app.domain.toml_spans import inline_entries, scan
from app.domain.toml_text import toml_value
from trainer.contract.errors import UserError

ROOT = Path(__file__).parents[2]
SHIPPED = sorted([*ROOT.glob("configs/examples/*.toml"), *ROOT.glob("presets/*.toml")])
TORTURE = '''\
# head of the file
# of two lines

title = "a # no comment"   # but this is one
"quoted key" = 1
dotted.one = 1
dotted . "two" = 2 # spaced
big = 1_000
hex = 0xDEAD
when = 1979-05-27 07:32:00
multi = """
[not a table]
x = 1
"""  # behind
raw = \'\'\'it''s'\'\'\'
list = [ # comment ]
  1, 2, # two
  [3, "]"],
]
point = { x = 1, y.z = { a = [1, 2] }, "w w" = "}" }
empty = {}

  [indented]   # header comment
  # a comment of its own
  alpha = 1e-4
\t# beta = 2  # waits
  gamma = true

# about the array
[[items]]
name = "one"
[items.inner]
deep = 1
[[items.parts]]
n = 1
# about the second
[[items]]
name = "two"

[a.b.c]
k = 1
[a]
z = 1
# [ghost]
# k = 7
'''
EDITS = [
    ("title", '"b"', 'title = "b"   # but this is one\n'),
    ("dotted.one", "3", "dotted.one = 3\n"),
    ("dotted.two", "3", 'dotted . "two" = 3 # spaced\n'),
    ("multi", "1", "multi = 1  # behind\n"),
    ("point.x", "5", "point = { x = 5, y.z"),
    ("point.y.z.a", "[]", "y.z = { a = [] }"),
    ("point.y.z.b", "8", "{ a = [1, 2], b = 8 }"),
    ("empty.k", "1", "empty = { k = 1 }"),
    ("indented.beta", "3", "\tbeta = 3  # waits\n"),
    ("indented.delta", "3", "  gamma = true\n  delta = 3\n\n# about the array"),
    ("items[1].name", '"x"', '[[items]]\nname = "x"\n\n[a.b.c]'),
    ("items[0].inner.more", "2", "deep = 1\nmore = 2\n[[items.parts]]"),
    ("items[0].parts[0].n", "2", "[[items.parts]]\nn = 2\n"),
    ("dotted.three", "4", "dotted.three = 4\nbig"),
    ("a.k", "7", "[a]\nz = 1\nk = 7\n"),
    ("fresh.k", "7", "# k = 7\n\n[fresh]\nk = 7\n"),
    ("items[2].name", '"x"', '\n[[items]]\nname = "x"\n'),
    ("top", "1", "empty = {}\ntop = 1\n\n  [indented]"),
]


def put(content: Any, path: tuple, value: Any) -> None:
    """Set a value in plain data."""
    for place, part in enumerate(path[:-1]):
        following = path[place + 1]
        if isinstance(part, int):
            if part == len(content):
                content.append({})
            content = content[part]
        else:
            content = content.setdefault(part, [] if isinstance(following, int) else {})
    content[path[-1]] = value


def drop(content: Any, path: tuple) -> None:
    for part in path[:-1]:
        content = content[part]
    del content[path[-1]]


def leaves(value: Any, path: tuple = ()) -> list[tuple]:
    """Return the path of everything that is no table."""
    if isinstance(value, dict):
        return [leaf for key, part in value.items() for leaf in leaves(part, (*path, key))]
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        return [leaf for n, part in enumerate(value) for leaf in leaves(part, (*path, n))]
    return [path]


def without_empty(value: Any) -> Any:
    """Return plain data without empty tables: one may stay when its last key goes."""
    if isinstance(value, dict):
        return {k: w for k, part in value.items() if (w := without_empty(part)) != {}}
    return [without_empty(part) for part in value] if isinstance(value, list) else value


@pytest.mark.parametrize(("key", "raw", "there"), EDITS, ids=lambda part: str(part)[:20])
@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_a_value_is_set_where_it_belongs(key, raw, there, newline):
    text = TORTURE.replace("\n", newline)
    document = ConfigDocument(text)
    wanted = tomllib.loads(text)
    put(wanted, path_of(key), tomllib.loads(f"v = {raw}")["v"])
    document.set(key, raw)
    assert tomllib.loads(document.text) == wanted
    assert there.replace("\n", newline) in document.text
    assert document.raw(key) == raw
    assert document.undo()
    assert document.text == text
    assert document.redo()
    assert document.raw(key) == raw


def test_every_key_of_every_shipped_file_is_found_and_can_be_removed():
    for text in [TORTURE, *(path.read_text(encoding="utf-8") for path in SHIPPED)]:
        content = tomllib.loads(text)
        document = ConfigDocument(text)
        found = [path for path in leaves(content) if "quoted key" not in path and "w w" not in path]
        assert len(found) > 5
        for path in found:
            key = key_of(path)
            wanted = tomllib.loads(text)
            value = wanted
            for part in path:
                value = value[part]
            assert document.value(key) == value
            line = text.splitlines()[document.line_of(key) - 1]
            assert str(path[-1]) in line
            drop(wanted, path)
            document.remove(key)
            assert without_empty(tomllib.loads(document.text)) == without_empty(wanted)
            assert document.undo()
            assert document.text == text


def test_a_text_with_mistakes_can_be_edited_around_them():
    text = (
        'name = "fish\n[training\nseed = \n[model]\nvae = "v" junk\n# tokenizer = 1\nx = [1,\n'
        "[memory]\nblocks_to_swap = 1  # swap\n"
    )
    document = ConfigDocument(text)
    assert document.spans.broken == (1, 2, 3, 5, 7)
    document.set("memory.blocks_to_swap", "20")
    document.set("model.tokenizer", '"t"')
    document.set("name", '"cat"')
    document.set("seed", "7")
    document.set("model.x", "[1]")
    assert document.text == (
        'name = "cat"\n[training\nseed = 7\n[model]\nvae = "v" junk\ntokenizer = "t"\nx = [1]\n'
        "[memory]\nblocks_to_swap = 20  # swap\n"
    )
    document.edit(document.text.replace("[training\n", "").replace(" junk", ""))
    assert document.content()["seed"] == 7
    while document.undo():
        pass
    assert document.text == text


@pytest.mark.parametrize(
    ("key", "raw", "words"),
    [
        ("training.seed", "", "not a TOML value"),
        ("training.seed", "1\nx = 2", "not a TOML value"),
        ("training.seed", "1 # why", "something behind it"),
        ("training.seed", "[1", "not a TOML value"),
        ("name.first", "1", "written as one value"),
        ("training", "1", "cannot be changed here"),
        ("techniques[3].name", '"x"', "no place"),
        ("techniques[0].a.b", "1", "table that is not there"),
    ],
)
def test_what_cannot_be_done_is_refused_and_nothing_is_changed(key, raw, words):
    text = 'name = "a"\n[training]\nseed = 1\n[[techniques]]\nname = "ema"\n'
    document = ConfigDocument(text)
    with pytest.raises(UserError, match=words):
        document.set(key, raw)
    assert document.text == text
    assert not document.can_undo
    document.remove("not.there")
    assert not document.undo()
    assert not document.redo()


def test_an_empty_file_and_a_last_line_without_an_end():
    document = ConfigDocument("")
    document.set("training.seed", "1")
    document.set("name", '"x"')
    assert document.text == 'name = "x"\n[training]\nseed = 1\n'
    document = ConfigDocument("[training]\nseed = 1")
    document.set("training.max_steps", "2")
    document.set("memory.blocks_to_swap", "3")
    wanted = "[training]\nseed = 1\nmax_steps = 2\n\n[memory]\nblocks_to_swap = 3\n"
    assert document.text == wanted
    document = ConfigDocument("# what it is\n\n# of the model\n[model]\n")
    document.set("name", '"x"')
    assert document.text == '# what it is\n\nname = "x"\n# of the model\n[model]\n'


def test_typed_text_keeps_the_line_ends_of_what_it_does_not_touch():
    text = "a = 1\r\nb = 2\nc = 3\r\n# x\u2028y\r\nd = 4"
    document = ConfigDocument(text)
    seen = "\r\n".join(text.splitlines())
    document.edit(seen)
    assert document.text == text
    document.edit(seen.replace("c = 3", "c = 33\r\nnew = 1"))
    assert document.text == text.replace("c = 3\r\n", "c = 33\r\nnew = 1\r\n")
    document.undo()
    assert document.text == text
    document.edit(seen + "\r\n")
    assert document.text == text + "\r\n"


def test_what_is_typed_in_a_row_is_undone_at_once():
    document = ConfigDocument("a = 1\n")
    for text in ("a = 12\n", "a = 123\n"):
        document.edit(text, group="line 0")
    document.edit("a = 123\nb = 2\n", group="line 1")
    document.undo()
    assert document.text == "a = 123\n"
    document.undo()
    assert document.text == "a = 1\n"
    document.redo()
    document.edit("a = 1234\n", group="line 0")
    document.undo()
    assert document.text == "a = 123\n"


_KEYS = st.sampled_from(["a", "b", "c", "d_e", "f-g", "h"])
_VALUES = st.recursive(
    st.one_of(
        st.integers(-(2**40), 2**40),
        st.floats(allow_nan=False, allow_infinity=False),
        st.booleans(),
        st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=8),
    ),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)
_TABLES = st.recursive(
    st.dictionaries(_KEYS, _VALUES, max_size=4),
    lambda inner: st.dictionaries(
        _KEYS, st.one_of(_VALUES, inner, st.lists(inner, min_size=1, max_size=2)), max_size=4
    ),
    max_leaves=8,
)


def written(content: dict, layout: random.Random) -> str:
    """Write plain data in an untidy way: comments, indents, blank lines, inline tables."""
    lines: list[str] = []

    def remark() -> str:
        return layout.choice(["", "", "  # why", " #"])

    def table(values: dict, header: str) -> None:
        deep = []
        for key, value in values.items():
            tables = isinstance(value, list) and value and all(isinstance(v, dict) for v in value)
            if (isinstance(value, dict) or tables) and layout.random() < 0.8:
                deep.append((key, value))
                continue
            if layout.random() < 0.3:
                lines.append(layout.choice(["", "# a remark", f"#{key}", "   # = no key"]))
            indent, gap = layout.choice(["", "", "  "]), layout.choice([" ", "", "   "])
            lines.append(f"{indent}{key}{gap}={gap}{toml_value(value)}{remark()}")
        for key, value in deep:
            inner = f"{header}.{key}" if header else key
            for part in value if isinstance(value, list) else [value]:
                lines.append(layout.choice(["", "# about this table"]))
                lines.append(f"[[{inner}]]" if isinstance(value, list) else f"[{inner}]{remark()}")
                table(part, inner)

    table(content, "")
    newline = layout.choice(["\n", "\n", "\r\n"])
    return newline.join(lines) + layout.choice([newline, ""])


@settings(max_examples=50, deadline=None)
@given(_TABLES, st.randoms(use_true_random=False), st.data())
def test_random_edits_say_what_was_meant_and_touch_nothing_else(content, layout, data):
    text = written(content, layout)
    start = tomllib.loads(text)
    assert start == content
    assert tomlkit.parse(text).unwrap() == content
    document = ConfigDocument(text)
    assert not document.spans.broken
    for _ in range(4):
        before = document.text
        wanted = tomllib.loads(before)
        known = leaves(wanted)
        path = data.draw(st.sampled_from(known)) if known else ()
        action = data.draw(st.sampled_from(["set", "add", "remove"]))
        if action == "add" or not path:
            at = next((n for n, p in enumerate(path) if p == "new"), len(path) - 1)
            path = (*path[: max(at, 0)], "new")
        value = data.draw(_VALUES)
        try:
            if action == "remove":
                document.remove(key_of(path))
            else:
                document.set(key_of(path), toml_value(value))
        except UserError:
            assert document.text == before
            assert any(isinstance(part, int) for part in path), "an array written as one value"
            continue
        if action != "remove":
            put(wanted, path, value)
        elif document.text != before:
            drop(wanted, path)
        after = tomllib.loads(document.text)
        assert without_empty(after) == without_empty(wanted)
        _assert_lines_kept(before, document.text, path)
    while document.undo():
        pass
    assert document.text == text
    while document.redo():
        pass


def _assert_lines_kept(before: str, after: str, path: tuple) -> None:
    """Assert that at most the lines of one pair differ, in one place."""
    old, new = before.splitlines(keepends=True), after.splitlines(keepends=True)
    first = next((n for n, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), None)
    first = min(len(old), len(new)) if first is None else first
    last = 0
    while last < min(len(old), len(new)) - first and old[-1 - last] == new[-1 - last]:
        last += 1
    gone, come = old[first : len(old) - last], new[first : len(new) - last]
    assert len(gone) <= 2
    assert len(come) <= 4
    assert all("#" not in line or "=" in line for line in gone), "a comment of its own was lost"


@settings(max_examples=60, deadline=None)
@given(st.text("ab=[]{}\"'#.,\\ \n\r\t1", max_size=60))
def test_any_text_is_scanned_and_a_right_one_without_a_complaint(text):
    spans = scan(text)
    for pair in spans.pairs:
        assert text[pair.lines.start : pair.lines.end].strip()
    document = ConfigDocument(text)
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        pass
    else:
        assert not spans.broken
    document.edit(text + "x = 1\n")
    document.undo()
    assert document.text == text


@pytest.mark.parametrize("path", SHIPPED[1:3], ids=lambda path: path.stem)
def test_two_hundred_random_edits_and_undo_leave_the_file_as_it_was(path):
    text = path.read_text(encoding="utf-8")
    document, layout = ConfigDocument(text), random.Random(7)
    wanted, num_edits = tomllib.loads(text), 0
    sections = ["training", "memory", "model", "checkpoint", "fresh"]
    while num_edits < 200:
        known = leaves(wanted)
        where = layout.choice(known)
        if layout.random() < 0.3:
            where = (layout.choice(sections), f"key_{layout.randrange(30)}")
        value = layout.choice([1, 2.5, True, "words # with", [1, [2]], {"k": "v"}])
        if layout.random() < 0.3 and where in known and len(where) > 1:
            document.remove(key_of(where))
            drop(wanted, where)
        else:
            document.set(key_of(where), toml_value(value))
            put(wanted, where, value)
        num_edits += 1
        assert without_empty(document.content()) == without_empty(wanted)
    while document.undo():
        pass
    assert document.text.encode() == path.read_bytes()
    while document.redo():
        pass
    assert without_empty(document.content()) == without_empty(wanted)


def test_a_deep_value_and_an_open_inline_table_are_mistakes():
    assert scan("x = " + "[" * 5000 + "]" * 5000).broken == (1,)
    assert list(inline_entries("{ a = 1, b", 0))[-1].keys == ("a",)
    assert scan('"\\q" = 1\n').broken == (1,)
