"""Checkpoints are whole or absent, the newest whole one is found, the last good one is kept."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests.engine.toy import AdamWFactory, LoraStep, make_batch
from trainer.contract.errors import DiskError, ModelFileError
from trainer.engine.local import LocalEngine
from trainer.training import checkpoints
from trainer.training.checkpoints import CheckpointStore


@pytest.fixture(scope="module")
def engine():
    module = LoraStep(blocks=1)
    engine = LocalEngine(
        module,
        module.trainable(),
        AdamWFactory(),
        device="cpu",
        max_grad_norm=0,
        gradient_accumulation_steps=1,
    )
    engine.forward_backward([make_batch(1)])
    engine.update(1e-2)
    return engine


@pytest.fixture
def warnings():
    return []


@pytest.fixture
def store(tmp_path, warnings):
    return CheckpointStore(tmp_path / "checkpoints", keep_last=2, warn=warnings.append)


def write_extra(folder: Path) -> None:
    (folder / "techniques").mkdir()
    (folder / "techniques" / "a.bin").write_bytes(b"x" * 1000)


def save(store, engine, *steps, write=write_extra):
    return [store.save(step, write, {"step": step, "epoch": 1}, engine) for step in steps][-1]


def names(store):
    return sorted(path.name for path in store._root.iterdir())


class OtherRank:
    """Rank 1 of two, as far as saving asks; `flags` is what it told the others."""

    rank, world_size = 1, 2

    def __init__(self, failing: bool, others_fail_at: int = -1) -> None:
        self.failing, self.others_fail_at = failing, others_fail_at
        self.flags: list[bool] = []

    def any_rank(self, flag: bool) -> bool:
        self.flags.append(flag)
        return flag or len(self.flags) - 1 == self.others_fail_at

    def save_state(self, folder: Path) -> None:
        if self.failing:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))


def test_a_rank_that_cannot_save_tells_the_others_who_wait(store):
    engine = OtherRank(failing=True)
    with pytest.raises(DiskError, match="no space left"):
        store.save(5, lambda folder: None, {}, engine)
    assert engine.flags == [False, True]


@pytest.mark.parametrize("stage", range(4))
def test_a_rank_stops_where_another_could_not_go_on(store, stage):
    engine = OtherRank(failing=False, others_fail_at=stage)
    with pytest.raises(DiskError, match="another process of this run could not"):
        store.save(5, lambda folder: None, {}, engine)
    assert engine.flags == [False] * (stage + 1)


def test_layout_and_manifest(store, engine):
    saved = save(store, engine, 500)
    assert saved.path.name == "step-00000500"
    manifest = json.loads((saved.path / "manifest.json").read_text())
    assert (manifest["format"], manifest["step"], manifest["world_size"]) == (1, 500, 1)
    assert (manifest["engine"], manifest["zero_stage"]) == ("local", 0)
    on_disk = {
        path.relative_to(saved.path).as_posix()
        for path in saved.path.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }
    assert set(manifest["files"]) == on_disk
    assert on_disk == {"engine.json", "progress.json", "rank-00000.safetensors", "techniques/a.bin"}
    for name, entry in manifest["files"].items():
        assert entry["size"] == (saved.path / name).stat().st_size
        answer = subprocess.run(
            ["b2sum", "-l", "256", str(saved.path / name)], capture_output=True, text=True
        )
        assert answer.stdout.split()[0] == entry["blake2b"]
    assert saved.progress == {"step": 500, "epoch": 1}
    assert store.latest() == saved


def test_nothing_at_first(store):
    store.tidy()
    assert store.latest() is None
    assert store.resolve("auto") is None


def test_the_last_ones_stay(store, engine):
    save(store, engine, 10, 20, 30, 40)
    assert names(store) == ["step-00000030", "step-00000040"]
    assert store.latest().step == 40


def damage_cut(path):
    file = path / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def damage_flip(path):
    file = path / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


def damage_missing(path):
    (path / "techniques" / "a.bin").unlink()


def damage_manifest(path):
    (path / "manifest.json").write_text('{"format": 1, "files": {')


def damage_no_manifest(path):
    (path / "manifest.json").unlink()


def damage_no_files(path):
    (path / "manifest.json").write_text('{"format": 1, "step": 3, "sequence": 9, "files": {}}')


def damage_outside(path):
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../secret"] = {"size": 0, "blake2b": ""}
    (path / "manifest.json").write_text(json.dumps(manifest))


def damage_progress(path):
    (path / "progress.json").write_text("[]")


def damage_format(path):
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": 2}))


DAMAGES = [value for name, value in sorted(globals().items()) if name.startswith("damage_")]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_broken_one_is_reported_passed_over_and_kept(store, engine, warnings, damage):
    save(store, engine, 10, 20)
    damage(store._root / "step-00000020")
    assert store.latest().step == 10
    assert len(warnings) == 1
    assert "step-00000020" in warnings[0]
    with pytest.raises(ModelFileError, match="not a whole checkpoint"):
        store.load(store._root / "step-00000020")

    save(store, engine, 30)
    assert (store._root / "step-00000020").is_dir()
    assert store.latest().step == 30


def test_broken_ones_do_not_push_out_the_last_good_one(store, engine):
    save(store, engine, 10, 20)
    damage_cut(store._root / "step-00000020")
    save(store, engine, 30)
    assert names(store) == ["step-00000010", "step-00000020", "step-00000030"]


def test_the_newest_is_the_last_saved_not_the_highest_step(store, engine):
    save(store, engine, 100, 200)
    again = save(store, engine, 150)  # resumed from 100
    assert store.latest() == again
    assert names(store) == ["step-00000150", "step-00000200"]
    save(store, engine, 175)
    assert names(store) == ["step-00000150", "step-00000175"]


def test_a_step_can_be_saved_again(store, engine):
    first = save(store, engine, 100)
    second = store.save(100, lambda _: None, {"step": 100, "again": True}, engine)
    assert second.sequence > first.sequence
    assert store.latest().progress["again"]
    assert names(store) == ["step-00000100"]


def test_leftovers_are_removed_at_the_start(store, engine):
    save(store, engine, 10)
    partial = store._root / ".step-00000020.partial"
    shutil.copytree(store._root / "step-00000010", partial)
    half_deleted = store._root / ".step-00000005.old"
    shutil.copytree(store._root / "step-00000010", half_deleted)
    (half_deleted / "manifest.json").unlink()
    assert store.latest().step == 10
    store.tidy()
    assert names(store) == ["step-00000010"]


def test_killed_between_the_renames_of_a_replacement(store, engine):
    saved = save(store, engine, 10)
    saved.path.rename(store._root / ".step-00000010.old")
    store.tidy()
    assert store.latest() == saved


def test_killed_after_the_renames_of_a_replacement(store, engine):
    saved = save(store, engine, 10)
    shutil.copytree(saved.path, store._root / ".step-00000010.old")
    store.tidy()
    assert names(store) == ["step-00000010"]
    assert store.latest() == saved


class Fails:
    """A `write` that fails the way a machine does."""

    def __init__(self, error):
        self.error = error

    def __call__(self, folder):
        (folder / "some.bin").write_bytes(b"half")
        raise self.error


def test_a_full_disk_leaves_the_previous_intact(store, engine):
    before = save(store, engine, 10)
    with pytest.raises(DiskError, match="no space left") as caught:
        save(store, engine, 20, write=Fails(OSError(errno.ENOSPC, "full")))
    assert "intact" in caught.value.hint
    assert names(store) == ["step-00000010"]
    assert store.latest() == before


def test_any_failure_leaves_the_previous_intact(store, engine):
    before = save(store, engine, 10)
    for error in (KeyboardInterrupt(), RuntimeError("bug"), DiskError("gone")):
        with pytest.raises(type(error)):
            save(store, engine, 20, write=Fails(error))
        assert names(store) == ["step-00000010"]
    with pytest.raises(RuntimeError):
        save(store, engine, 10, write=Fails(RuntimeError("while replacing")))
    assert store.latest() == before


def test_a_disk_that_lies_is_noticed_before_the_rename_and_the_rotation(store, engine, monkeypatch):
    save(store, engine, 10, 20)
    real = checkpoints.write_json

    def lying(path, content):
        real(path, content)
        if path.name == "manifest.json":
            damage_flip(path.parent)

    monkeypatch.setattr(checkpoints, "write_json", lying)
    with pytest.raises(DiskError, match="not what was written"):
        save(store, engine, 30)
    assert names(store) == ["step-00000010", "step-00000020"]


def test_everything_is_flushed_before_the_rename(store, engine, monkeypatch):
    order = []
    real_fsync, real_rename = checkpoints.fsync, Path.rename

    def fsync(path):
        order.append(("fsync", path.name))
        real_fsync(path)

    def rename(self, target):
        order.append(("rename", self.name))
        return real_rename(self, target)

    monkeypatch.setattr(checkpoints, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    save(store, engine, 10)
    at = order.index(("rename", ".step-00000010.partial"))
    flushed = {name for kind, name in order[:at] if kind == "fsync"}
    assert {"a.bin", "rank-00000.safetensors", "progress.json", "techniques"} <= flushed
    assert ".step-00000010.partial" in flushed
    assert ("fsync", "checkpoints") in order[at:]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting needs root")
def test_a_really_full_disk(tmp_path, engine):
    root = tmp_path / "small"
    root.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(root)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        store = CheckpointStore(root / "checkpoints", keep_last=2)
        saved = save(store, engine, 10)
        with pytest.raises(DiskError) as caught:
            save(
                store, engine, 20, write=lambda folder: (folder / "big").write_bytes(b"x" * 200_000)
            )
        assert "no space left" in str(caught.value)
        filler = root / "filler"
        with pytest.raises(OSError, match="No space left"):
            filler.write_bytes(b"x" * 200_000)
        with pytest.raises(DiskError):  # now the engine's own file does not fit
            save(store, engine, 20)
        assert names(store) == ["step-00000010"]
        assert store.load(saved.path) == saved
        filler.unlink()
        assert save(store, engine, 20).step == 20
    finally:
        subprocess.run(["umount", str(root)], check=True)


def test_resolving_what_to_resume(store, engine, tmp_path):
    save(store, engine, 10, 20)
    assert store.resolve("never") is None
    assert store.resolve("auto").step == 20
    assert store.resolve(str(store._root / "step-00000010")).step == 10
    assert store.resolve(str(store._root)).step == 20
    assert store.resolve(str(tmp_path)).step == 20  # the run directory
    other = CheckpointStore(tmp_path / "other", keep_last=1)
    assert other.resolve(str(tmp_path)).step == 20
    with pytest.raises(ModelFileError, match="no whole checkpoint") as caught:
        store.resolve(str(tmp_path / "nowhere"))
    assert "--resume auto" in caught.value.hint
    damage_cut(store._root / "step-00000010")
    with pytest.raises(ModelFileError, match="rank-00000"):
        store.resolve(str(store._root / "step-00000010"))


def test_what_comes_back_is_what_was_saved(store, engine):
    saved = save(store, engine, 10)
    module = LoraStep(blocks=1)
    other = LocalEngine(
        module,
        module.trainable(),
        AdamWFactory(),
        device="cpu",
        max_grad_norm=0,
        gradient_accumulation_steps=1,
    )
    other.load_state(saved.path)
    for name, value in engine.full_parameters().items():
        assert torch.equal(other.full_parameters()[name], value)


def test_keep_last_must_keep_something(tmp_path):
    with pytest.raises(ValueError, match="at least 1"):
        CheckpointStore(tmp_path, keep_last=0)
