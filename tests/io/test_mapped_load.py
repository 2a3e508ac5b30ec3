"""Opening weight files: what is read, what is refused, and that nothing else can happen."""

from __future__ import annotations

import contextlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainer.contract.errors import ModelFileError
from trainer.io.mapped_load import open_weights
from trainer.io.safetensors_header import DTYPES

FEW = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)


def sample_tensors() -> dict[str, Tensor]:
    """Return tensors of many dtypes and awkward shapes."""
    random = torch.Generator().manual_seed(0)
    noise = torch.randn(37, 19, generator=random)
    return {
        "float": noise,
        "half": noise.half(),
        "brain": noise.bfloat16(),
        "fp8": noise.to(torch.float8_e4m3fn),
        "fp8_e5m2": noise.to(torch.float8_e5m2),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "flags": torch.tensor([True, False]),
        "long": torch.tensor([-1, 2**40]),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "large": torch.randn(300, 200, generator=random),
    }


def raw_file(path: Path, header: Any, body: bytes = b"", *, pad: int = 0) -> Path:
    """Write a safetensors file whose header says whatever is wanted."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * pad
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


def same(one: Tensor, other: Tensor) -> bool:
    """Tell whether dtype, shape and bytes are equal."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return (
        one.contiguous()
        .reshape(-1)
        .view(torch.uint8)
        .equal(other.contiguous().reshape(-1).view(torch.uint8))
    )


@pytest.mark.parametrize("container", ["safetensors", "zip", "legacy"])
def test_every_dtype_and_shape_is_read(tmp_path: Path, container: str) -> None:
    tensors = sample_tensors()
    path = tmp_path / ("model.safetensors" if container == "safetensors" else "model.pth")
    if container == "safetensors":
        save_file(tensors, path, metadata={"author": "me"})
    else:
        if container == "legacy":  # the old container has no fp8
            tensors = {name: t for name, t in tensors.items() if "fp8" not in name}
        torch.save(tensors, path, _use_new_zipfile_serialization=container == "zip")
    weights = open_weights(path)
    assert set(weights) == set(tensors)
    assert weights.metadata == ({"author": "me"} if container == "safetensors" else {})
    assert weights.config == {}
    for name, tensor in tensors.items():
        info = weights[name]
        assert (info.shape, info.dtype) == (tuple(tensor.shape), tensor.dtype)
        assert info.nbytes == tensor.nbytes
        found = weights.read(name)
        assert same(found, tensor), name
        weights.release(name)
        assert same(found, tensor), f"{name} after its pages were released"


def test_tensors_are_mapped_and_the_file_is_safe_from_writes(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(sample_tensors(), path)
    before = path.read_bytes()
    weights = open_weights(path)
    found = weights.read("large")
    assert weights.read("large").data_ptr() == found.data_ptr()
    found.zero_()
    assert path.read_bytes() == before


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")
@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
def test_released_pages_leave_memory(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    tensors = {"weight": torch.ones(8 << 20, dtype=torch.uint8)}
    if path.suffix == ".pth":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)

    def resident() -> int:
        lines = iter(Path("/proc/self/smaps").read_text().splitlines())
        for line in lines:
            if line.endswith(str(path)):
                return next(int(x.split()[1]) for x in lines if x.startswith("Rss:"))
        raise AssertionError("the file is not mapped")

    weights = open_weights(path)
    assert int(weights.read("weight").sum()) == 8 << 20
    assert resident() > 8000
    weights.release("weight")
    assert resident() < 100


def test_unaligned_headers_of_old_writers_are_read(tmp_path: Path) -> None:
    values = torch.arange(5, dtype=torch.float32)
    header = {"x": {"dtype": "F32", "shape": [5], "data_offsets": [0, 20]}}
    pad = (5 - len(json.dumps(header))) % 8
    path = raw_file(tmp_path / "a.safetensors", header, values.numpy().tobytes(), pad=pad)
    assert (8 + len(json.dumps(header)) + pad) % 4
    assert torch.equal(open_weights(path).read("x"), values)


def test_a_header_whose_length_looks_like_a_pickle_is_read_under_any_name(tmp_path: Path) -> None:
    path = tmp_path / "half-written.partial"
    for padding in range(640):
        save_file({"a": torch.ones(3)}, path, metadata={"pad": "x" * padding})
        if path.read_bytes()[:2] == b"\x80\x02":
            break
    assert torch.equal(open_weights(path).read("a"), torch.ones(3))


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    whole = tmp_path / "whole.safetensors"
    save_file({"a": torch.ones(3), "b": torch.ones(2, 2)}, whole)
    content = whole.read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in range(len(content)):
        cut.write_bytes(content[:length])
        with pytest.raises(ModelFileError, match=r"cut\.safetensors"):
            open_weights(cut)
    cut.write_bytes(content + b"x")
    with pytest.raises(ModelFileError, match="follow the last tensor"):
        open_weights(cut)


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    """Return one tensor's description."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"x": entry(offsets=(0, 4))}, "needs 8"),
        ({"x": entry(offsets=(8, 0))}, "needs 8"),
        ({"x": entry(offsets=(-8, 0))}, "impossible"),
        ({"x": entry(shape=(-2,))}, "impossible"),
        ({"x": entry(shape=(True,), offsets=(0, 4))}, "impossible"),
        ({"x": entry(shape=(2**62, 2**62))}, "needs"),
        ({"x": entry(shape=(10**30,))}, "impossible"),
        ({"x": entry(shape=(1.5,))}, "impossible"),
        ({"x": entry(), "y": entry()}, "overlaps"),
        ({"x": entry(), "y": entry(offsets=(4, 12))}, "overlaps"),
        ({"x": entry(offsets=(4, 12))}, "hole"),
        ({"x": entry(offsets=(0, 8)), "y": entry(shape=(10**6,), offsets=(8, 4000008))}, "trunc"),
        ({"x": entry(dtype="F4")}, "'F4'"),
        ({"x": entry(dtype=["F32"])}, "data type"),
        ({"x": {"dtype": "F32"}}, "not described"),
        ({"x": 5}, "not described"),
        ({"__metadata__": {"a": 1}, "x": entry()}, "table of strings"),
        ({"__metadata__": "text", "x": entry()}, "table of strings"),
        ([1, 2], "not a JSON object"),
        (b'{"x": 1, "x": 2}', "given twice: x"),
        (b"{", "valid JSON"),
        (b"\xff\xfe", "valid JSON"),
        (b"[" * 200_000, "valid JSON"),
        (b'{"x": ' + b"9" * 5000 + b"}", "valid JSON"),
    ],
)
def test_hostile_headers_are_refused(tmp_path: Path, header: Any, reason: str) -> None:
    path = raw_file(tmp_path / "bad.safetensors", header, bytes(12))
    with pytest.raises(ModelFileError, match=reason) as caught:
        open_weights(path)
    assert "bad.safetensors" in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 100_000_001, 1000])
def test_header_lengths_beyond_the_file_are_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(ModelFileError, match="claims"):
        open_weights(path)


@FEW
@given(content=st.binary(max_size=200))
def test_random_bytes_are_refused_or_empty(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "random.safetensors"
    path.write_bytes(content)
    try:
        weights = open_weights(path)
    except ModelFileError:
        return
    assert all(weights.read(name) is not None for name in weights)


SMALL = st.integers(-1, 6)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "F4", "f32", ""]),
        "shape": st.lists(SMALL, max_size=3),
        "data_offsets": st.lists(st.integers(-1, 24), min_size=1, max_size=3),
    }
)


@FEW
@given(header=st.dictionaries(st.text(max_size=3), ENTRIES, max_size=3), size=st.integers(0, 24))
def test_what_is_accepted_is_valid(tmp_path: Path, header: dict[str, Any], size: int) -> None:
    path = raw_file(tmp_path / "made.safetensors", header, bytes(range(size)))
    try:
        weights = open_weights(path)
    except ModelFileError:
        return
    with safe_open(path, framework="pt") as independent:
        assert set(independent.keys()) == set(weights)
        for name in weights:
            assert same(independent.get_tensor(name), weights.read(name))


@FEW
@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), max_size=4),
    flips=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=2),
)
def test_valid_files_are_accepted_and_damaged_ones_never_crash(
    tmp_path: Path, shapes: list[list[int]], flips: list[tuple[int, int]]
) -> None:
    path = tmp_path / "made.safetensors"
    tensors = {str(index): torch.rand(shape) for index, shape in enumerate(shapes)}
    save_file(tensors, path)
    weights = open_weights(path)
    assert all(same(weights.read(name), tensor) for name, tensor in tensors.items())
    content = bytearray(path.read_bytes())
    for position, value in flips:
        content[position % len(content)] = value
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(content)
    try:
        weights = open_weights(damaged)
    except ModelFileError:
        return
    try:
        with safe_open(damaged, framework="pt") as independent:
            assert set(independent.keys()) == set(weights)
    except SafetensorError as error:  # pragma: no cover
        pytest.fail(f"accepted what the format's own library refuses: {error}")


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("echo this must never run > /dev/null",)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_with_code_are_refused_by_name(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "evil.pth"
    torch.save({"w": _Evil()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ModelFileError, match=r"(posix|nt)\.system") as caught:
        open_weights(path)
    assert "evil.pth" in str(caught.value)
    assert caught.value.exit_code == 2


def test_whole_pickled_models_are_refused_by_name(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pth")
    with pytest.raises(ModelFileError, match="Linear"):
        open_weights(tmp_path / "model.pth")


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_pickles_are_refused(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "model.pth"
    torch.save({"w": torch.ones(5000)}, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    for share in (0.0, 0.001, 0.01, 0.5, 0.99):
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(ModelFileError, match=r"model\.pth"):
            open_weights(path)


@FEW
@given(
    flips=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=3),
    zipped=st.booleans(),
)
def test_damaged_pickles_never_crash(
    tmp_path: Path, flips: list[tuple[int, int]], zipped: bool
) -> None:
    path = tmp_path / "model.pth"
    torch.save({"w": torch.ones(3)}, path, _use_new_zipfile_serialization=zipped)
    content = bytearray(path.read_bytes())
    for position, value in flips:
        content[position % len(content)] = value
    path.write_bytes(content)
    with contextlib.suppress(ModelFileError):
        open_weights(path)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "module"])
def test_wrapped_states_are_found(tmp_path: Path, wrapper: str) -> None:
    torch.save({wrapper: {"w": torch.ones(3)}, "step": 7}, tmp_path / "model.pth")
    assert list(open_weights(tmp_path / "model.pth")) == ["w"]


@pytest.mark.parametrize("content", [{"w": 3}, [torch.ones(2)], {}, torch.ones(2)])
def test_pickles_of_something_else_are_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(ModelFileError, match=r"tensor"):
        open_weights(tmp_path / "model.pth")


def shards(folder: Path) -> Path:
    """Write a folder of two shards with an index and a config."""
    folder.mkdir(exist_ok=True)
    save_file({"a": torch.zeros(2)}, folder / "m-00001-of-00002.safetensors")
    save_file({"b": torch.ones(3)}, folder / "m-00002-of-00002.safetensors")
    weight_map = {"a": "m-00001-of-00002.safetensors", "b": "m-00002-of-00002.safetensors"}
    write_index(folder, weight_map)
    (folder / "config.json").write_text('{"dim": 5}')
    return folder


def write_index(folder: Path, weight_map: Any) -> None:
    """Write the index of a folder of shards."""
    (folder / "m.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_are_one_table(tmp_path: Path) -> None:
    folder = shards(tmp_path / "model")
    weights = open_weights(folder)
    assert (set(weights), weights.config) == ({"a", "b"}, {"dim": 5})
    assert torch.equal(weights.read("b"), torch.ones(3))
    (folder / "m.safetensors.index.json").unlink()
    assert set(open_weights(folder)) == {"a", "b"}


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../secret.safetensors"}, "outside its folder"),
        ({"a": "/etc/passwd"}, "outside its folder"),
        ({"a": "missing.safetensors"}, "is missing"),
        ({"c": "m-00001-of-00002.safetensors"}, "not in the shards: c"),
        ({}, "no weight_map"),
        ("text", "no weight_map"),
    ],
)
def test_indexes_that_lie_are_refused(tmp_path: Path, weight_map: Any, message: str) -> None:
    folder = shards(tmp_path / "model")
    write_index(folder, weight_map)
    with pytest.raises(ModelFileError, match=message):
        open_weights(folder)


def test_two_models_in_one_folder_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "one.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "two.safetensors")
    with pytest.raises(ModelFileError, match=r"both one\.safetensors and two\.safetensors"):
        open_weights(tmp_path)


def test_what_is_no_weight_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "high_noise_model").mkdir()
    cases = {
        tmp_path / "missing.safetensors": "does not exist",
        tmp_path: "high_noise_model",
    }
    for name, content, message in (
        ("a.gguf", b"GGUF" + bytes(40), "GGUF"),
        ("b.safetensors", b"version https://git-lfs.github.com/spec/v1\noid", "git-lfs"),
        ("c.safetensors", b"<!doctype html><html>", "not a valid safetensors"),
        ("d.pth", b"<!doctype html><html>", "not a torch file"),
        ("e.safetensors", b"", "0 bytes"),
    ):
        (tmp_path / "files").mkdir(exist_ok=True)
        (tmp_path / "files" / name).write_bytes(content)
        cases[tmp_path / "files" / name] = message
    for path, message in cases.items():
        with pytest.raises(ModelFileError, match=message):
            open_weights(path)


def test_broken_config_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    for content in ("{", "[]", "\x00"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ModelFileError, match=r"config\.json"):
            open_weights(tmp_path)
