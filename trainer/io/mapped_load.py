"""Opens weight files of any container as one table of tensors, mapped instead of read.

Only data is ever taken from a file: safetensors, or a torch pickle restricted to tensors.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from trainer.contract.errors import ModelFileError
from trainer.io.safetensors_header import read_header
from trainer.io.torch_pickle import TorchFile

SAFETENSORS_SUFFIXES = (".safetensors", ".sft")
TORCH_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What is known of a tensor without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int


class _Container(Protocol):
    """One file of a `WeightFiles`."""

    path: Path
    metadata: dict[str, str]

    def names(self) -> Iterator[str]: ...
    def info(self, name: str) -> TensorInfo: ...
    def read(self, name: str) -> Tensor: ...
    def release(self, name: str) -> None: ...


class WeightFiles(Mapping[str, TensorInfo]):
    """The tensors of a file or folder: name -> shape, dtype and size, in file order.

    Attributes:
        path: what was opened, as the user gave it.
        metadata: the string table of the safetensors headers, {} for other containers.
        config: `config.json` beside the weights, {} if there is none.
    """

    def __init__(
        self, path: Path, containers: list[_Container], config: dict[str, Any] | None = None
    ) -> None:
        self.path = path
        self.config = config or {}
        self.metadata: dict[str, str] = {}
        self._home: dict[str, _Container] = {}
        for container in containers:
            self.metadata |= container.metadata
            for name in container.names():
                if name in self._home:
                    raise ModelFileError(
                        f"tensor {name!r} is in both {self._home[name].path.name} and "
                        f"{container.path.name} of {path}",
                        hint="the folder holds several models: give the file you want",
                    )
                self._home[name] = container

    def __getitem__(self, name: str) -> TensorInfo:
        return self._home[name].info(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)

    def read(self, name: str) -> Tensor:
        """Return the tensor as it is in the file: mapped CPU memory, own dtype, no copy.

        The memory is private: writing to it does not reach the file, but is lost on `release`.
        """
        return self._home[name].read(name)

    def release(self, name: str) -> None:
        """Give the pages of `name` back to the system; reading again maps them again.

        Tensors that `read` has returned stay valid. Does nothing where the system cannot.
        """
        self._home[name].release(name)


def open_weights(path: Path | str) -> WeightFiles:
    """Open a weight file, or a folder of shards with or without an index.

    Raises:
        ModelFileError: nothing is there, or it is damaged, unsafe or of an unknown kind.
    """
    path = Path(path)
    if not path.exists():
        raise ModelFileError(f"{path} does not exist", hint="check the path")
    try:
        files = _files(path) if path.is_dir() else [path]
        folder = path if path.is_dir() else path.parent
        return WeightFiles(path, [_open_file(file) for file in files], _read_config(folder))
    except OSError as error:
        raise ModelFileError(
            f"{error.filename or path} cannot be read: {error.strerror}",
            hint="check its permissions and the disk it is on",
        ) from error


class _SafetensorsFile:
    def __init__(self, path: Path) -> None:
        header = read_header(path)
        self.path = path
        self.metadata = header.metadata
        self._spans = header.spans
        # A private writable mapping: torch needs a writable buffer, the file must not change.
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def names(self) -> Iterator[str]:
        return iter(self._spans)

    def info(self, name: str) -> TensorInfo:
        span = self._spans[name]
        return TensorInfo(span.shape, span.dtype, span.end - span.start)

    def read(self, name: str) -> Tensor:
        span = self._spans[name]
        nbytes, start = span.end - span.start, span.start
        if nbytes == 0:
            return torch.empty(span.shape, dtype=span.dtype)
        if start % span.dtype.itemsize:
            # Old writers did not align the header; unaligned access is slow or fatal elsewhere.
            raw = torch.frombuffer(self._map, dtype=torch.uint8, offset=start, count=nbytes)
            return raw.clone().view(span.dtype).view(span.shape)
        count = nbytes // span.dtype.itemsize
        flat = torch.frombuffer(self._map, dtype=span.dtype, offset=start, count=count)
        return flat.view(span.shape)

    def release(self, name: str) -> None:
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        span = self._spans[name]
        start = -(-span.start // mmap.PAGESIZE) * mmap.PAGESIZE
        length = span.end // mmap.PAGESIZE * mmap.PAGESIZE - start
        if length > 0:
            self._map.madvise(mmap.MADV_DONTNEED, start, length)


class _TorchContainer:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, str] = {}
        self._file = TorchFile(path)

    def names(self) -> Iterator[str]:
        return iter(self._file.tensors)

    def info(self, name: str) -> TensorInfo:
        tensor = self._file.tensors[name]
        return TensorInfo(tuple(tensor.shape), tensor.dtype, tensor.nbytes)

    def read(self, name: str) -> Tensor:
        return self._file.tensors[name]

    def release(self, name: str) -> None:
        self._file.release(name)


def _open_file(path: Path) -> _Container:
    with path.open("rb") as file:
        start = file.read(32)
    if start.startswith(b"GGUF"):
        raise ModelFileError(
            f"{path} is a GGUF file, which Menma cannot train from",
            hint="use the safetensors release of the model (fp16, bf16 or fp8)",
        )
    if start.startswith(b"version https://git-lfs"):
        raise ModelFileError(
            f"{path} is a git-lfs pointer, not the weights", hint="run `git lfs pull`"
        )
    # A safetensors header of 640 bytes starts like a pickle; behind its length is a brace.
    torch_like = start.startswith((b"PK\x03\x04", b"\x80\x02")) and start[8:9] != b"{"
    if torch_like and path.suffix not in SAFETENSORS_SUFFIXES:
        return _TorchContainer(path)
    if path.suffix.lower() in TORCH_SUFFIXES:
        raise ModelFileError(
            f"{path} is not a torch file", hint="it is damaged or incomplete; download it again"
        )
    return _SafetensorsFile(path)


def _files(folder: Path) -> list[Path]:
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if len(indexes) > 1:
        names = ", ".join(index.name for index in indexes)
        raise ModelFileError(f"{folder} has several indexes: {names}", hint="keep one of them")
    if indexes:
        return _indexed_files(indexes[0])
    for suffixes in (SAFETENSORS_SUFFIXES, TORCH_SUFFIXES):
        found = sorted(f for f in folder.iterdir() if f.is_file() and f.suffix in suffixes)
        if found:
            return found
    inner = ", ".join(sorted(child.name for child in folder.iterdir() if child.is_dir()))
    raise ModelFileError(
        f"{folder} holds no weights (*.safetensors, *.pth)",
        hint=f"did you mean one of its folders: {inner}?" if inner else "check the path",
    )


def _indexed_files(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFileError(f"{index} has no weight_map", hint="download the index again")
    files: list[Path] = []
    for name in sorted({str(value) for value in weight_map.values()}):
        file = index.parent / name
        if Path(name).name != name or name in {"", ".", ".."}:
            raise ModelFileError(f"{index} points outside its folder: {name!r}")
        if not file.is_file():
            raise ModelFileError(f"{file} is missing; {index.name} names it", hint="download it")
        files.append(file)
    _check_index(index, weight_map)
    return files


def _check_index(index: Path, weight_map: dict[str, Any]) -> None:
    headers = {
        name: read_header(index.parent / name).spans.keys()
        for name in {str(value) for value in weight_map.values()}
    }
    lost = sorted(name for name, file in weight_map.items() if name not in headers[str(file)])
    if lost:
        raise ModelFileError(
            f"{len(lost)} tensors of {index} are not in the shards: {', '.join(lost[:5])}",
            hint="index and shards are of different downloads; download the folder again",
        )


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    return read_json(file) if file.is_file() else {}


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`.

    Raises:
        ModelFileError: it is not one.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelFileError(f"{path} is not a JSON object")
    return content
