"""What each operator of a Wan block takes, keeps and gives back, in bytes.

The counterparts of `trainer.models.wan` and `trainer.adapters.lora_linear`, operator by operator;
`tests/memory` compares them with the real ones on fake tensors. An operator returns its output,
which belongs to the caller as its inputs do, and its backward, which takes over the gradient that
it is given and returns the gradient of the input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from trainer.contract.memory_model.adapter_kinds import Branch
from trainer.contract.memory_model.ledger import Buffer, Ledger

FLOAT32 = 4

Fp8 = Literal["dequantised", "products"] | None
Backward = Callable[[Buffer], Buffer | None]
AttentionBackward = Callable[[Buffer], tuple[Buffer, Buffer, Buffer]]


class AdapterLayer(NamedTuple):
    """What an adapter is on one layer, in elements."""

    trained: int
    """Of its parameters."""
    branch: Branch
    """What it computes beside the base's product."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """A linear layer: frozen, with an adapter, or trained itself."""

    inputs: int
    outputs: int
    adapter: AdapterLayer | None = None
    trained: bool = False
    """Its own weight and bias get gradients."""
    input_gradient: bool = True
    """What is in front of it is trained, too."""
    fp8: Fp8 = None
    """The weight is fp8: made into the activations' dtype for each product, or multiplied as it
    is; None: it is no fp8."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadNorm:
    """The norm of queries and keys, and their turn by positions."""

    dim: int
    turned: int = 0
    """Width of the rotary table; 0: not turned."""
    trained: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """One call of the attention kernel."""

    rows: int
    """Queries, all samples together."""
    dim: int
    heads: int
    workspace: float
    """Bytes that the backward takes beside its results."""
    kept_result: bool = False
    """The forward keeps its result even where it records nothing."""
    known_result: bool = False
    """The result of an earlier forward was kept: it is there already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Affine:
    """What follows a layer norm."""

    fused: bool = True
    """Shift and scale are the kernel's own: those of one sample, or weights."""
    trained: bool = False


class Operators:
    """Operators on the buffers of one ledger.

    Args:
        ledger: counts.
        element: bytes of an activation's element, 2 or 4.
    """

    def __init__(self, ledger: Ledger, element: int) -> None:
        self.ledger = ledger
        self.element = element

    def linear(
        self, x: Buffer, rows: int, layer: Linear, *, unused: bool = False
    ) -> tuple[Buffer, Backward]:
        """Multiply `rows` rows; `unused`: the product itself is not computed."""
        if layer.adapter is not None:
            return self._adapter_linear(x, rows, layer, layer.adapter, unused=unused)
        ledger, e = self.ledger, self.element
        kept = ledger.keep(x) if layer.trained else None
        out = self._product(rows, layer, unused=unused)

        def backward(grad: Buffer) -> Buffer | None:
            given = self._input_gradient(rows, layer)
            if layer.trained:
                ledger.gradient(layer.outputs * (layer.inputs + 1) * e)
            ledger.drop(grad, kept)
            return given

        return out, backward

    def _adapter_linear(
        self, x: Buffer, rows: int, layer: Linear, adapter: AdapterLayer, *, unused: bool
    ) -> tuple[Buffer, Backward]:
        ledger, e, branch = self.ledger, self.element, adapter.branch
        cast = 0 if e == FLOAT32 else e  # the factors are float32
        sides = layer.inputs + layer.outputs
        trained, factors = adapter.trained / sides, branch.factors / sides
        kept = ledger.keep(x)
        down = ledger.new(factors * layer.inputs * cast)
        low = ledger.new(rows * branch.width * e)
        up = ledger.new(factors * layer.outputs * cast)
        out = self._product(rows, layer, unused=unused)
        if not unused:
            ledger.touch((branch.formed + rows * branch.passing) * e)
        kept_out = ledger.keep(out) if branch.rescales else None
        if not ledger.recording:
            ledger.drop(down, low, up)

        def backward(grad: Buffer) -> Buffer | None:
            if branch.rescales:
                ledger.touch(rows * layer.outputs * e)
                ledger.drop(kept_out)
            base = self._input_gradient(rows, layer)
            low_grad = ledger.new(rows * branch.width * e)
            ledger.touch((branch.formed_again + rows * branch.passing_again) * e)
            ledger.touch(factors * layer.outputs * e)
            ledger.drop(grad, low, up)
            ledger.gradient(trained * layer.outputs * FLOAT32)
            ledger.touch(factors * layer.inputs * e)
            through = None if base is None else ledger.new(base.size)
            ledger.drop(kept, down, low_grad)
            given = None if base is None else self.add(base, through)
            ledger.gradient(trained * layer.inputs * FLOAT32)
            return given

        return out, backward

    def _product(self, rows: int, layer: Linear, *, unused: bool) -> Buffer:
        """Multiply with the weight."""
        if unused:
            return self.ledger.new(0)
        e = self.element
        weight = self._floats(layer)
        rounded = self._rounded(rows * layer.inputs, layer)
        out = self.ledger.new(rows * layer.outputs * e)
        self.ledger.drop(weight, rounded)
        return out

    def _input_gradient(self, rows: int, layer: Linear) -> Buffer | None:
        """Multiply a gradient with the weight."""
        if not layer.input_gradient:
            return None
        weight = self._floats(layer)
        scaled = None
        if layer.fp8 == "products":
            scaled = self.ledger.new(rows * layer.outputs * self.element)
        rounded = self._rounded(rows * layer.outputs, layer)
        columns = None
        if layer.fp8 == "products":
            columns = self.ledger.new(layer.inputs * layer.outputs)
        given = self.ledger.new(rows * layer.inputs * self.element)
        self.ledger.drop(weight, scaled, rounded, columns)
        return given

    def _floats(self, layer: Linear) -> Buffer | None:
        """An fp8 weight in the dtype of the activations."""
        if layer.fp8 != "dequantised":
            return None
        return self.ledger.new(layer.inputs * layer.outputs * self.element)

    def _rounded(self, elements: int, layer: Linear) -> Buffer | None:
        """Activations in fp8; on the way there is a scaled copy."""
        if layer.fp8 != "products":
            return None
        self.ledger.touch(elements * (self.element + 1))
        return self.ledger.new(elements)

    def head_norm(self, x: Buffer, rows: int, norm: HeadNorm) -> tuple[Buffer, Backward]:
        """Norm and turn; in float32 inside."""
        ledger, e = self.ledger, self.element
        wide, table = rows * norm.dim * FLOAT32, rows * norm.turned * FLOAT32
        cast = e != FLOAT32
        kept = ledger.keep(x)
        wide_x = ledger.new(wide) if cast else None
        scale = ledger.new(rows * FLOAT32)
        wide_out = ledger.new(wide)
        ledger.touch(table)
        out = ledger.new(rows * norm.dim * e) if cast else ledger.share(wide_out)
        ledger.drop(wide_out, wide_x, None if ledger.recording else scale)

        def backward(grad: Buffer) -> Buffer:
            wide_x = ledger.new(wide) if cast else None
            wide_grad = ledger.new(wide)
            ledger.touch((wide if cast else 0) + 2 * table)
            ledger.touch(wide)
            if norm.trained:
                ledger.gradient(norm.dim * e)
            given = ledger.new(rows * norm.dim * e) if cast else ledger.share(wide_grad)
            ledger.drop(wide_x, wide_grad, kept, scale, grad)
            return given

        return out, backward

    def attention(
        self, query: Buffer, key: Buffer, value: Buffer, sizes: Attention
    ) -> tuple[Buffer, AttentionBackward]:
        """Attend; the kernel keeps its inputs, its output and a sum a query and head."""
        ledger = self.ledger
        make = ledger.known if sizes.known_result else ledger.new
        kept = [ledger.keep(query), ledger.keep(key), ledger.keep(value)]
        out = make(sizes.rows * sizes.dim * self.element)
        sums = make(sizes.rows * sizes.heads * FLOAT32)
        if ledger.recording or sizes.kept_result:
            kept += [ledger.share(out), sums]
        else:
            ledger.drop(sums)

        def backward(grad: Buffer) -> tuple[Buffer, Buffer, Buffer]:
            grads = (ledger.new(query.size), ledger.new(key.size), ledger.new(value.size))
            ledger.touch(sizes.workspace)
            ledger.drop(grad, *kept)
            return grads

        return out, backward

    def norm(self, x: Buffer, size: float, affine: Affine) -> tuple[Buffer, Backward]:
        """Layer norm; `size` bytes."""
        ledger = self.ledger
        kept = ledger.keep(x)
        out = ledger.new(size)
        kept_normed = None
        if not affine.fused:
            normed, out = out, ledger.new(size)
            if affine.trained:
                kept_normed = ledger.keep(normed)
            ledger.drop(normed)

        def backward(grad: Buffer) -> Buffer:
            if not affine.fused:
                scaled = ledger.new(size)
                if affine.trained:
                    ledger.touch(2 * size)
                ledger.drop(grad, kept_normed)
                grad = scaled
            given = ledger.new(size)
            ledger.drop(grad, kept)
            return given

        return out, backward

    def gate(
        self, update: Buffer, size: float, *, trained: bool, unused: bool = False
    ) -> tuple[Buffer, Callable[[], Buffer]]:
        """Add a gated update to the tokens; the backward makes the update's gradient."""
        ledger = self.ledger
        kept = ledger.keep(update) if trained else None
        out = ledger.new(0) if unused else ledger.over(update)

        def backward() -> Buffer:
            given = ledger.new(size)
            if trained:
                ledger.touch(2 * size)
                ledger.drop(kept)
            return given

        return out, backward

    def activation(self, x: Buffer) -> tuple[Buffer, Backward]:
        """Apply a function to each element."""
        ledger = self.ledger
        kept = ledger.keep(x)
        out = ledger.over(x)

        def backward(grad: Buffer) -> Buffer:
            given = ledger.new(x.size)
            ledger.drop(grad, kept)
            return given

        return out, backward

    def add(self, first: Buffer | None, second: Buffer | None) -> Buffer:
        """Add two results, of which one may be missing, and take both over."""
        if first is None or second is None:
            only = first if second is None else second
            assert only is not None
            return only
        total = self.ledger.over(first)
        self.ledger.drop(first, second)
        return total
