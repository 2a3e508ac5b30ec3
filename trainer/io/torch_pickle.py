"""Torch pickles (.pth, .pt, .bin) of tensors only; anything that could run code is refused."""

from __future__ import annotations

import ctypes
import mmap
import pickle
import re
import struct
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.contract.errors import ModelFileError

_DAMAGE = (
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    AssertionError,
    ArithmeticError,
    struct.error,
)
"""What torch's unpickler raises when it stumbles over damaged bytes; found by fuzzing."""
_WRAPPERS = ("state_dict", "model", "module")


class TorchFile:
    """The tensors of a torch pickle, mapped where the file is a zip (torch 1.6 and newer).

    Raises:
        ModelFileError: the pickle wants to import something, or it holds no table of tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mapped = zipfile.is_zipfile(path)
        self.tensors = _tensors(path, self._load())

    def _load(self) -> Any:
        try:
            return torch.load(
                self.path, map_location="cpu", weights_only=True, mmap=self._mapped or None
            )
        except pickle.UnpicklingError as error:
            raise _unsafe(self.path, error) from error
        except _DAMAGE as error:
            reason = str(error) or type(error).__name__
            raise ModelFileError(
                f"{self.path} cannot be read: {reason.splitlines()[0]}",
                hint="the file is damaged or incomplete; download or copy it again",
            ) from error

    def release(self, name: str) -> None:
        """Give the pages of `name` back to the system; only mapped files have such pages."""
        if not self._mapped or sys.platform != "linux":
            return
        storage = self.tensors[name].untyped_storage()
        start = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (storage.data_ptr() + storage.nbytes()) // mmap.PAGESIZE * mmap.PAGESIZE - start
        if length > 0:
            # torch maps the file itself and offers no way to drop pages.
            ctypes.CDLL(None).madvise(
                ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_int(mmap.MADV_DONTNEED)
            )


def _tensors(path: Path, content: Any) -> dict[str, Tensor]:
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    if not isinstance(content, Mapping) or not content:
        raise ModelFileError(f"{path} holds no table of tensors", hint="it is not a weight file")
    strange = [key for key, value in content.items() if not isinstance(value, Tensor)]
    if strange:
        raise ModelFileError(
            f"{path}: {strange[0]!r} is not a tensor", hint="it is not a plain weight file"
        )
    return {str(key): value.detach() for key, value in content.items()}


def _unsafe(path: Path, error: pickle.UnpicklingError) -> ModelFileError:
    found = re.search(r"GLOBAL (\S+)|Unsupported (?:class|global|operand) (\S+)", str(error))
    if found is None:
        return ModelFileError(
            f"{path} is not a safe torch file: {str(error).splitlines()[0]}",
            hint="use a safetensors file of the same model",
        )
    name = found.group(1) or found.group(2)
    return ModelFileError(
        f"{path} was refused: its pickle asks for {name}, which could run code",
        hint="use a safetensors file of the same model; never load such a file elsewhere either",
    )
