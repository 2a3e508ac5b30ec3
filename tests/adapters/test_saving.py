from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from trainer.contract.errors import DiskError
from trainer.io.atomic_save import save_safetensors
from trainer.io.safetensors_header import read_header
from trainer.io.stream_save import TensorSlot, stream_safetensors

DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.bool,
]


def tensors_of(shapes) -> dict[str, torch.Tensor]:
    return {
        f"t{i}": torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
        for i, (shape, dtype) in enumerate(shapes)
    }


SHAPES = st.lists(
    st.tuples(st.lists(st.integers(0, 3), max_size=3), st.sampled_from(DTYPES)), max_size=6
)


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(
        found[n].dtype == wanted[n].dtype
        and found[n].shape == wanted[n].shape
        and found[n].contiguous().view(-1).view(torch.uint8).tolist()
        == wanted[n].contiguous().view(-1).view(torch.uint8).tolist()
        for n in wanted
    )


def stream(tensors, path, metadata=None, read=None):
    slots = {name: TensorSlot(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    stream_safetensors(slots, read or tensors.__getitem__, path, metadata)


@settings(max_examples=50, deadline=None)
@given(SHAPES, st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3))
def test_both_writers_write_what_the_library_reads(tmp_path_factory, shapes, metadata):
    folder = tmp_path_factory.mktemp("saving")
    tensors = tensors_of(shapes)
    for write in (save_safetensors, stream):
        path = folder / write.__name__
        write(tensors, path, metadata)
        assert same(load_file(path), tensors)
        with safe_open(path, "pt") as file:
            assert (file.metadata() or {}) == metadata


def test_streamed_tensors_are_aligned_as_the_library_does_it(tmp_path):
    tensors = {"a": torch.ones(3, dtype=torch.bool), "b": torch.ones(2), "c": torch.ones(1).half()}
    stream(tensors, tmp_path / "streamed")
    save_safetensors(tensors, tmp_path / "saved")
    spans = read_header(tmp_path / "streamed").spans
    assert list(spans) == list(read_header(tmp_path / "saved").spans) == ["b", "c", "a"]
    assert all(span.start % span.dtype.itemsize == 0 for span in spans.values())


def test_views_and_shared_memory_become_tensors_of_their_own(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    tensors = {"whole": whole, "again": whole, "row": whole[1], "turned": whole.t()}
    save_safetensors(tensors, tmp_path / "file")
    assert same(load_file(tmp_path / "file"), tensors)
    assert (tmp_path / "file").stat().st_size < 1000


@pytest.mark.parametrize("error", ["disk", "library", "lie", "check"])
def test_an_earlier_file_survives_every_failure(tmp_path, monkeypatch, error):
    path = tmp_path / "file"
    path.write_bytes(b"earlier")
    expected: type[Exception] = DiskError

    def write(tensors, file, metadata):
        Path(file).write_bytes(b"half")
        if error == "disk":
            raise OSError(errno.ENOSPC, "full", str(file))
        if error == "library":
            raise SafetensorError("I/O error: no space left on device")

    def refuse(file):
        raise ValueError("not good")

    if error == "check":
        expected = ValueError
    else:
        monkeypatch.setattr("trainer.io.atomic_save.save_file", write)
    with pytest.raises(expected):
        save_safetensors({"a": torch.ones(2)}, path, check=refuse)
    assert path.read_bytes() == b"earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_a_stream_that_breaks_off_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"earlier")
    tensors = {"a": torch.ones(2), "b": torch.ones(3)}

    def read(name):
        if name == "b":
            raise OSError(errno.ENOSPC, "full", "x")
        return tensors[name]

    with pytest.raises(DiskError):
        stream(tensors, path, read=read)
    with pytest.raises(ValueError, match="announced"):
        stream(tensors, path, read=lambda name: torch.ones(1))
    assert path.read_bytes() == b"earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_a_faulty_disk_is_noticed_while_streaming(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.io.stream_save._checksum", lambda file, length: 1)
    with pytest.raises(DiskError, match="reading it back"):
        stream({"a": torch.ones(2)}, tmp_path / "file")
    assert not list(tmp_path.iterdir())
