"""`menma lora blend`: the invariants of sharing, on the updates."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from trainer.adapters import load_adapter
from trainer.jobs.lora_blend import Blend, group_of

from .lora_tool_runs import HALVES, deltas, effect, header, lora, refusal, same_bits, tool

SCHEME = {"ss_loraid_slots": "2", "ss_loraid_num_blocks": "3"}


@pytest.fixture
def three(tmp_path):
    """Two LoRAs of all layers, and one of the feed-forward layers alone."""
    paths = [tmp_path / f"{name}.safetensors" for name in ("one", "two", "three")]
    lora(paths[0], rank=3, alpha=6.0)
    lora(paths[1], rank=2, alpha=1.0, seed=5, layout="comfy")
    lora(paths[2], rank=2, alpha=2.0, seed=6, names=HALVES["ffn"])
    return paths


def blended(paths, folder, share, strengths=None, **options):
    files = [{"path": path, "strength": (strengths or {}).get(path, 1.0)} for path in paths]
    tool("lora_blend", files=files, output=folder, share=share, force=True, **options)
    return [deltas(folder / path.name) for path in paths]


def total(tables):
    tables = list(tables)
    names = dict.fromkeys(name for table in tables for name in table)
    return {name: sum(table.get(name, 0.0) for table in tables) for name in names}


def close(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-6)


@given(st.floats(0, 1), st.lists(st.floats(0, 100), min_size=2, max_size=6), st.floats(0, 4))
def test_every_lora_gets_one_whole_share(share, norms, votes):
    blend = Blend(share=share, votes=votes, groups={})
    rows = blend.weights("ffn", norms)
    assert [sum(row) for row in rows] == pytest.approx([1] * len(norms))
    if votes == 0:
        assert [sum(column) for column in zip(*rows, strict=True)] == pytest.approx(
            [1] * len(norms)
        )


def test_no_share_changes_nothing(three, tmp_path):
    folder = tmp_path / "out"
    blended(three, folder, 0.0)
    for path in three:
        before, after = load_file(path), load_file(folder / path.name)
        assert before.keys() == after.keys()
        assert all(same_bits(after[key], value) for key, value in before.items())
        assert "ss_loraid_shared" not in header(folder / path.name)


@pytest.mark.parametrize("votes", [0.0, 1.0])
def test_the_whole_share_makes_all_equal(three, tmp_path, votes):
    first, *others = blended(three, tmp_path / "out", 1.0, votes=votes)
    for other in others:
        close(first, other)
    if votes == 0:
        close(first, {name: value / 3 for name, value in total(map(deltas, three)).items()})


@pytest.mark.parametrize("share", [0.2, 0.7, 1.0])
def test_the_sum_is_kept(three, tmp_path, share):
    close(total(blended(three, tmp_path / "out", share)), total(map(deltas, three)))


def test_each_becomes_its_own_part_and_a_part_of_the_others(three, tmp_path):
    found = blended(three, tmp_path / "out", 0.3)
    own = [deltas(path) for path in three]
    for i, table in enumerate(found):
        wanted = [
            {n: (0.8 if i == j else 0.1) * v for n, v in part.items()} for j, part in enumerate(own)
        ]
        close(table, total(wanted))
    folder = tmp_path / "out"
    parts = [(path, 0.8 if path is three[0] else 0.1) for path in three]
    torch.testing.assert_close(
        effect((folder / "one.safetensors", 1.0)), effect(*parts), rtol=1e-5, atol=1e-5
    )


def test_the_order_of_the_files_does_not_matter(three, tmp_path):
    blended(three, tmp_path / "a", 0.4, votes=1.0)
    blended(three[::-1], tmp_path / "b", 0.4, votes=1.0)
    for path in three:
        one, other = (load_file(tmp_path / side / path.name) for side in "ab")
        assert all(same_bits(other[key], value) for key, value in one.items())


def test_votes_count_norms_by_group(three, tmp_path):
    share, votes = 0.5, 2.0
    found = blended(three, tmp_path / "out", share, votes=votes)
    own = [deltas(path) for path in three]
    for group in ("self", "cross", "ffn"):
        norms = [
            sum(float(v.square().sum()) for n, v in table.items() if group_of(n) == group) ** 0.5
            for table in own
        ]
        say = [norm**votes / sum(other**votes for other in norms) for norm in norms]
        for name in (n for n in own[0] if group_of(n) == group):
            parts = [share * say[j] * table.get(name, 0.0) for j, table in enumerate(own)]
            wanted = (1 - share) * own[1][name] + sum(parts)
            torch.testing.assert_close(found[1][name], wanted, rtol=1e-4, atol=1e-6)


def test_groups_scale_the_share(three, tmp_path):
    groups = {"cross": 1.0, "self": 0.5, "ffn": 0.0}
    found = blended(three, tmp_path / "out", 0.6, groups=groups)
    own = [deltas(path) for path in three]
    for name, value in found[0].items():
        share = 0.6 * groups[group_of(name)]
        mean = sum(table.get(name, torch.zeros(())) for table in own) / 3
        torch.testing.assert_close(
            value, (1 - share) * own[0][name] + share * mean, rtol=1e-4, atol=1e-6
        )
    assert group_of("head.head") == "other"


def test_slots_are_only_scaled_and_marked_as_shared(tmp_path):
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    lora(one, names=HALVES["attention"], metadata={**SCHEME, "ss_loraid": "1"})
    lora(two, names=HALVES["ffn"], metadata={**SCHEME, "ss_loraid": "2"})
    folder = tmp_path / "out"
    blended([one, two], folder, 0.2)
    found = load_adapter(folder / "one.safetensors")
    for path, weight in ((one, 0.9), (two, 0.1)):
        for name, update in load_adapter(path).items():
            assert same_bits(found[name].down_RI, update.down_RI)
            assert same_bits(found[name].up_OR, update.up_OR)
            assert found[name].alpha == pytest.approx(weight * update.alpha)
    said = header(folder / "one.safetensors")
    assert said["ss_loraid"] == "1"
    assert said["ss_loraid_shared"] == "1,2;a=0.2"


def test_a_cut_bounds_the_ranks(three, tmp_path):
    blended(three, tmp_path / "out", 0.5, rank=3)
    ranks = {u.rank for path in three for u in load_adapter(tmp_path / "out" / path.name).values()}
    assert max(ranks) == 3


def test_mistakes_are_named_and_nothing_is_written(three, tmp_path, capfd):
    files = [{"path": path} for path in three]
    ask = {"files": files, "output": tmp_path / "out", "share": 0.5}

    def said(**changes):
        return refusal("lora_blend", tmp_path, capfd, **(ask | changes))

    assert "share" in said(share=1.5)
    assert "factor of self is 2" in said(groups={"self": 2.0})
    assert "groups" in said(groups={"selff": 1.0})
    assert "is a file" in said(output=three[0])
    assert "is an input" in said(output=tmp_path, force=True)
    elsewhere = tmp_path / "elsewhere" / "one.safetensors"
    elsewhere.parent.mkdir()
    lora(elsewhere)
    assert "two LoRAs are named one" in said(files=[files[0], {"path": elsewhere}])
