"""Peak memory of Menma's own training step, from running it on fake tensors.

Every operator runs for shape and dtype only (`FakeTensorMode`), whatever the model's size; a
dispatch mode watches which storages are alive and remembers the most there were at once, rounded
as CUDA's allocator rounds. So the oracle knows nothing of formulas: it is the step that tells.

What is assumed, because fake tensors alone would not tell what a GPU does:

* The fake device is called `cpu`: without CUDA in torch, autograd refuses fake `cuda` tensors.
  Where the CPU and the CUDA kernels of an operator allocate differently, CUDA's are put in place:
  attention is `_scaled_dot_product_flash_attention`, with a bias the memory-efficient kernel. Its
  output and log-sum-exp are kept, and no matrix of scores exists, as it would in the `math` form.
  AdamW is the fused one.
* The flash backward holds a float32 copy of the gradient of the queries and one float a row:
  FlashAttention-2's and the memory-efficient kernel's workspace.
* Captions fill all the model's text tokens unless a test says otherwise.
* Workspaces of matrix products (cuBLAS: some 10 MiB) belong to the context, not to the step.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROUND = 512
"""CUDA's allocator gives out multiples of this many bytes."""


@dataclass(slots=True)
class Peak:
    """The most that was alive at once."""

    num_bytes: int = 0
    operator: str = ""
    alive: list[tuple[int, str, tuple[int, ...], str]] = field(default_factory=list)
    """Bytes, operator that made it, shape, dtype."""

    def table(self, top: int = 30) -> str:
        """Return what was alive, the largest first."""
        groups: Counter[tuple[Any, ...]] = Counter()
        counts: Counter[tuple[Any, ...]] = Counter()
        for size, *what in self.alive:
            groups[tuple(what)] += size
            counts[tuple(what)] += 1
        rows = [
            f"{size / 2**20:10.1f} MiB  {counts[key]:4d} x {key[1]} {key[2]}  {key[0]}"
            for key, size in groups.most_common(top)
        ]
        return "\n".join([f"{self.num_bytes / 2**20:.1f} MiB at {self.operator}", *rows])


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operators make, and forgets them as they die."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, tuple[int, str, tuple[int, ...], str]] = {}
        self.now = 0
        self.peak = Peak()
        self.trace: list[tuple[str, int]] | None = None

    def start(self) -> None:
        """Forget the peak so far."""
        self.peak = Peak()

    def register(self, tensor: Tensor, made_by: str) -> None:
        """Count a tensor's storage unless it is known."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        size = -(-storage.nbytes() // ROUND) * ROUND
        if key in self._alive or size == 0:
            return
        dtype = str(tensor.dtype).removeprefix("torch.")
        self._alive[key] = (size, made_by, tuple(tensor.shape), dtype)
        self.now += size
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._alive.pop(key)[0]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one operator and look at what is alive after it."""
        result = func(*args, **(kwargs or {}))
        name = str(func).removeprefix("aten.")
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.register(leaf, name)
        total = self.now + _workspace(name, args)
        if self.trace is not None:
            self.trace.append((name, total))
        if total > self.peak.num_bytes:
            self.peak = Peak(total, name, list(self._alive.values()))
        return result


def _workspace(name: str, args: tuple[Any, ...]) -> int:
    if "attention_backward" not in name:
        return 0
    b, n, length, k = args[1].shape
    rows = -(-length // 128) * 128
    return int(4 * b * n * rows * (k + 1))


@contextlib.contextmanager
def flash_attention() -> Iterator[None]:
    """Make `scaled_dot_product_attention` the operator that CUDA would take."""
    plain = F.scaled_dot_product_attention

    def flash(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        scale = options.get("scale")
        if attn_mask is None:
            attend = torch.ops.aten._scaled_dot_product_flash_attention
            return first(attend(query, key, value, scale=scale))
        bias = attn_mask.expand(*query.shape[:2], query.shape[2], key.shape[2])
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        sums = torch.is_grad_enabled()
        return first(efficient(query, key, value, bias, sums, scale=scale))

    def first(results: tuple[Tensor, ...]) -> Tensor:
        return results[0]

    F.scaled_dot_product_attention = flash
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


@contextlib.contextmanager
def watched() -> Iterator[LiveBytes]:
    """Run what is inside on fake tensors, attention as on CUDA, and watch it."""
    with FakeTensorMode(allow_non_fake_inputs=False), flash_attention(), LiveBytes() as live:
        yield live


def make_fake(module: nn.Module, dtype_of: Callable[[str], torch.dtype]) -> None:
    """Exchange the tensors of a module on the meta device for fake ones, which are counted."""
    for prefix, child in module.named_modules():
        for name, value in list(child._parameters.items()):
            if value is not None:
                dtype = dtype_of(f"{prefix}.{name}")
                fake = torch.empty(value.shape, dtype=dtype)
                child._parameters[name] = nn.Parameter(fake, requires_grad=value.requires_grad)
        for name, value in list(child._buffers.items()):
            if value is not None:
                child._buffers[name] = torch.empty(value.shape, dtype=value.dtype)
