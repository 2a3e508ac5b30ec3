"""The memory of one transformer block: `trainer.models.wan.block.WanBlock` in bytes.

The order of operators and what local variables hold are those of the real forward; a change there
is a change here, and the oracle of `tests/memory` notices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from trainer.contract.memory_model.ledger import Buffer, Ledger
from trainer.contract.memory_model.operators import (
    AdapterLayer,
    Affine,
    Attention,
    Backward,
    Fp8,
    HeadNorm,
    Linear,
    Operators,
)

_FLASH_ROWS = 128
"""The flash backward pads queries to a multiple of this many rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockShape:
    """Sizes of a block and of what it works on."""

    dim: int
    ffn_dim: int
    heads: int
    batch: int
    tokens: int
    """Video tokens of one sample."""
    text_tokens: int
    image_tokens: int = 0
    """CLIP tokens of one sample; 0: no image branch."""
    element: int = 2
    """Bytes of an activation's element."""
    fp8: Fp8 = None
    """How the linear layers multiply where their weights are fp8."""
    chunks: int = 1
    """Parts of the tokens over which the feed-forward runs, each recomputed in the backward."""
    attention_chunks: int = 1
    """Parts of the tokens in which what enters self-attention is made, and over which
    cross-attention runs, each recomputed in the backward."""

    @property
    def rows(self) -> int:
        """Video tokens of all samples."""
        return self.batch * self.tokens

    @property
    def tokens_bytes(self) -> float:
        """Bytes of all video tokens, once: what a checkpoint takes."""
        return self.rows * self.dim * self.element


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What of a block gets gradients."""

    layers: tuple[tuple[str, AdapterLayer], ...] = ()
    """Layers with an adapter, such as `self_attn.q`."""
    own: frozenset[str] = frozenset()
    """Parts of the block whose own weights are trained, such as `self_attn.q` or `norm3`."""
    front: bool = False
    """Weights of the model in front of all blocks are trained, too."""

    def adapter(self, name: str) -> AdapterLayer | None:
        """Return the adapter on a layer."""
        return next((layer for other, layer in self.layers if other == name), None)

    @property
    def modulated(self) -> bool:
        """Whether shifts, scales and gates need gradients."""
        return self.front or "modulation" in self.own


class BlockProfile(NamedTuple):
    """A block's bytes, relative to what is alive when it gets its input."""

    forward_peak: float
    """With its output."""
    kept: float
    """After the forward, for the backward; neither input nor output."""
    backward_peak: float
    """With the gradients of its output and of its weights."""
    gradients: float
    """Of its weights, made by its backward."""


def plain_block(shape: BlockShape, trained: Trained, *, first: bool = False) -> BlockProfile:
    """Return the bytes of a block whose activations are kept.

    Args:
        shape: sizes.
        trained: what gets gradients.
        first: nothing in front of the block is trained.
    """
    ledger = Ledger()
    out, backward = _Block(ledger, shape, trained, first=first).forward(Buffer(0))
    forward_peak = ledger.peak
    ledger.drop(out)
    kept = ledger.now
    ledger.start_peak()
    backward(ledger.new(shape.tokens_bytes))
    return BlockProfile(forward_peak, kept, ledger.peak, ledger.gradients)


def checkpointed_block(
    shape: BlockShape, trained: Trained, *, keep_attention: bool, first: bool = False
) -> BlockProfile:
    """Return the bytes of a block that runs once more in the backward.

    Args:
        shape: sizes.
        trained: what gets gradients.
        keep_attention: attention outputs are kept nevertheless.
        first: nothing in front of the block is trained.
    """
    silent = forward_only(shape, trained, keep_attention=keep_attention)
    ledger = Ledger()
    ledger.now = silent.kept
    gradient = ledger.new(shape.tokens_bytes)
    again = _Block(ledger, shape, trained, first=first, attention_known=keep_attention)
    out, backward = again.forward(Buffer(0), recomputing=True)
    ledger.drop(out)
    backward(gradient)
    return BlockProfile(silent.forward_peak, silent.kept, ledger.peak, ledger.gradients)


def forward_only(
    shape: BlockShape,
    trained: Trained,
    *,
    keep_attention: bool = False,
    in_place: bool = False,
) -> BlockProfile:
    """Return the bytes of a forward that keeps nothing but, if wanted, attention outputs.

    Args:
        shape: sizes.
        trained: what gets gradients.
        keep_attention: attention's outputs are kept.
        in_place: gradients are switched off, so that operators may reuse memory.
    """
    ledger = Ledger(recording=False, in_place=in_place)
    block = _Block(ledger, shape, trained, first=True, keep_attention=keep_attention)
    out, _ = block.forward(Buffer(0))
    ledger.drop(out)
    return BlockProfile(ledger.peak, ledger.now, 0, 0)


_Done = tuple[list[Buffer], Callable[[list[Buffer]], Buffer | None]]
"""Results, and the backward from their gradients to that of the tokens."""


class _Work(Protocol):
    def __call__(self, x: Buffer, rows: int, *, unused: bool) -> _Done: ...


@dataclass(slots=True)
class _Keys:
    """Keys and values that all tokens look at."""

    key: Buffer
    value: Buffer
    grads: tuple[Buffer | None, Buffer | None] = (None, None)
    backward: Callable[[], None] = lambda: None


class _Block:
    """Runs `WanBlock.forward` on a ledger."""

    def __init__(
        self,
        ledger: Ledger,
        shape: BlockShape,
        trained: Trained,
        *,
        first: bool,
        keep_attention: bool = False,
        attention_known: bool = False,
    ) -> None:
        self.ledger = ledger
        self.shape = shape
        self.trained = trained
        self.input_gradient = not first
        self.keep_attention = keep_attention
        self.attention_known = attention_known
        self.operators = Operators(ledger, shape.element)

    def forward(
        self, x: Buffer, *, recomputing: bool = False
    ) -> tuple[Buffer, Callable[[Buffer], None]]:
        """Run the block; the input belongs to the caller.

        A recomputation ends with the last tensor that is saved: in front of the last product,
        unless the gate behind it is trained.
        """
        drop, op, size = self.ledger.drop, self.operators, self.shape.tokens_bytes
        full = self.trained.modulated
        update, attend = self._self_attention(x)
        tokens, gate1 = op.gate(update, size, trained=full)
        if self.ledger.in_place:  # else a local variable holds it
            drop(update)
        seen, see = self._cross_attention(tokens)
        summed = self.ledger.over(seen)
        drop(seen, tokens)
        product, feed = self._feed_forward(summed, unused=recomputing and not full)
        if not self.ledger.in_place:
            drop(update)
        out, gate2 = op.gate(product, size, trained=full, unused=recomputing)
        drop(product, summed)

        def backward(grad: Buffer) -> None:
            grad = op.add(grad, feed(gate2()))
            grad = op.add(grad, see(self.ledger.share(grad)))
            given = attend(gate1())
            drop(grad if given is None else op.add(grad, given))

        return out, backward

    def _in_parts(
        self, work: _Work, num: int, x: Buffer, results: tuple[float, ...], *, unused: bool = False
    ) -> tuple[list[Buffer], Callable[[list[Buffer]], Buffer | None]]:
        """Run `work` on parts of the tokens, which it does once more for each in the backward.

        Args:
            work: given the tokens, their number and whether its last product is left out.
            num: of parts.
            x: the tokens.
            results: bytes of what comes out.
            unused: a recomputation ends before the last product is made.
        """
        if num == 1:
            return work(x, self.shape.rows, unused=unused)
        ledger, rows = self.ledger, -(-self.shape.rows // num)
        recording, ledger.recording = ledger.recording, False
        # A recomputation ends where the last part's input is saved.
        made = [work(Buffer(0), rows, unused=False)[0] for _ in range(num - unused)]
        ledger.recording = recording
        whole = []
        for number, result in enumerate(results):
            whole.append(ledger.new(0 if unused else result))
            ledger.drop(*(part[number] for part in made))
        kept = ledger.keep(x)

        def backward(grads: list[Buffer]) -> Buffer | None:
            given: list[Buffer | None] = []
            self.attention_known = False  # what was kept served the block's recomputation
            for number in range(num):
                ledger.adding = number > 0
                outs, part = work(Buffer(0), rows, unused=not self.trained.modulated)
                ledger.drop(*outs)
                given.append(part([Buffer(0) for _ in results]))
            ledger.adding = False
            whole = None if given[0] is None else ledger.new(self.shape.tokens_bytes)
            ledger.drop(kept, *grads, *given)
            return whole

        return whole, backward

    def _normed_tokens(self, x: Buffer, rows: int, *, by_time: bool) -> tuple[Buffer, Backward]:
        """Norm tokens, shifted and scaled by time or by the norm's own weights."""
        fused = not by_time or self.shape.batch == 1
        trained = self.trained.modulated if by_time else "norm3" in self.trained.own
        affine = Affine(fused=fused, trained=trained)
        return self.operators.norm(x, self._bytes(rows), affine)

    def _bytes(self, rows: int) -> float:
        return rows * self.shape.dim * self.shape.element

    def _feed_forward(
        self, x: Buffer, *, unused: bool
    ) -> tuple[Buffer, Callable[[Buffer], Buffer]]:
        size = (self.shape.tokens_bytes,)
        (product,), feed = self._in_parts(
            self._feed_part, self.shape.chunks, x, size, unused=unused
        )
        return product, lambda grad: _there(feed([grad]))

    def _feed_part(self, x: Buffer, rows: int, *, unused: bool) -> _Done:
        op, drop = self.operators, self.ledger.drop
        normed, norm = self._normed_tokens(x, rows, by_time=True)
        hidden, up = op.linear(normed, rows, self._layer("ffn.0"))
        active, activate = op.activation(hidden)
        drop(hidden)
        product, down = op.linear(active, rows, self._layer("ffn.2"), unused=unused)
        drop(active, normed)

        def backward(grads: list[Buffer]) -> Buffer | None:
            return norm(_there(up(_there(activate(_there(down(grads[0])))))))

        return [product], backward

    def _self_attention(self, x: Buffer) -> tuple[Buffer, Backward]:
        op, size = self.operators, self.shape.tokens_bytes
        (query, key, value), project = self._in_parts(
            self._project, self.shape.attention_chunks, x, (size, size, size)
        )
        mixed, attend = op.attention(query, key, value, self._attention(self.shape.rows))
        update, out = op.linear(mixed, self.shape.rows, self._layer("self_attn.o"))
        self.ledger.drop(mixed, query, key, value)

        def backward(grad: Buffer) -> Buffer | None:
            return project(list(attend(_there(out(grad)))))

        return update, backward

    def _project(self, x: Buffer, rows: int, *, unused: bool) -> _Done:
        """Make queries, keys and values; a recomputation needs the last product's norm at most."""
        op, given = self.operators, self.input_gradient
        turned = self.shape.dim // self.shape.heads
        normed, norm = self._normed_tokens(x, rows, by_time=True)
        query, back_query = self._normed("self_attn.q", normed, rows, turned=turned, given=given)
        key, back_key = self._normed("self_attn.k", normed, rows, turned=turned, given=given)
        layer = self._layer("self_attn.v", given=given)
        value, back_value = op.linear(normed, rows, layer, unused=unused)
        self.ledger.drop(normed)

        def backward(grads: list[Buffer]) -> Buffer | None:
            total = back_value(grads[2])
            total = self._sum(total, back_key(grads[1]))
            total = self._sum(total, back_query(grads[0]))
            return None if total is None else norm(total)

        return [query, key, value], backward

    def _cross_attention(self, x: Buffer) -> tuple[Buffer, Callable[[Buffer], Buffer]]:
        """Attend to the text and to CLIP tokens, each with its keys and values."""
        seen = [self._keys(self.shape.text_tokens, "")]
        if self.shape.image_tokens:
            seen.append(self._keys(self.shape.image_tokens, "_img"))
        chunks = self.shape.attention_chunks

        def look(x: Buffer, rows: int, *, unused: bool) -> _Done:
            return self._look(x, rows, seen, unused=unused)

        (update,), see = self._in_parts(look, chunks, x, (self.shape.tokens_bytes,))
        for keys in seen:
            self.ledger.drop(keys.key, keys.value)

        def backward(grad: Buffer) -> Buffer:
            given = _there(see([grad]))
            for keys in reversed(seen):
                keys.backward()
            return given

        return update, backward

    def _keys(self, tokens: int, suffix: str) -> _Keys:
        """Make keys and values of text or image tokens."""
        rows, outside, given = self.shape.batch * tokens, Buffer(0), self.trained.front
        key, back_key = self._normed(f"cross_attn.k{suffix}", outside, rows, given=given)
        layer = self._layer(f"cross_attn.v{suffix}", given=given)
        value, back_value = self.operators.linear(outside, rows, layer)
        keys = _Keys(key, value)

        def backward() -> None:
            key_grad, value_grad = keys.grads
            context_grad = self._sum(back_value(_there(value_grad)), back_key(_there(key_grad)))
            if context_grad is not None:
                self.ledger.touch(context_grad.size)
                self.ledger.drop(context_grad)

        keys.backward = backward
        return keys

    def _look(self, x: Buffer, rows: int, seen: list[_Keys], *, unused: bool) -> _Done:
        op, drop = self.operators, self.ledger.drop
        normed, norm = self._normed_tokens(x, rows, by_time=False)
        query, back_query = self._normed("cross_attn.q", normed, rows)
        drop(normed)
        mixed: Buffer | None = None
        attends = []
        for keys in seen:
            part, attend = op.attention(query, keys.key, keys.value, self._attention(rows))
            attends.append((keys, attend))
            mixed = part if mixed is None else op.add(mixed, part)
        mixed = _there(mixed)
        update, out = op.linear(mixed, rows, self._layer("cross_attn.o"), unused=unused)
        drop(mixed, query)

        def backward(grads: list[Buffer]) -> Buffer | None:
            mixed_grad = _there(out(grads[0]))
            query_grad = None
            for number, (keys, attend) in enumerate(reversed(attends)):
                last = number == len(attends) - 1
                given = mixed_grad if last else self.ledger.share(mixed_grad)
                part_grad, key_grad, value_grad = attend(given)
                keys.grads = op.add(keys.grads[0], key_grad), op.add(keys.grads[1], value_grad)
                query_grad = self._sum(query_grad, part_grad)
            return norm(_there(back_query(_there(query_grad))))

        return [update], backward

    def _normed(
        self, name: str, x: Buffer, rows: int, *, turned: int = 0, given: bool = True
    ) -> tuple[Buffer, Backward]:
        """Project and norm queries or keys."""
        op = self.operators
        product, multiply = op.linear(x, rows, self._layer(name, given=given))
        attention, _, inside = name.partition(".")
        trained = f"{attention}.norm_{inside}" in self.trained.own
        norm = HeadNorm(dim=self.shape.dim, turned=turned, trained=trained)
        normed, turn = op.head_norm(product, rows, norm)
        self.ledger.drop(product)

        def backward(grad: Buffer) -> Buffer | None:
            return multiply(_there(turn(grad)))

        return normed, backward

    def _layer(self, name: str, *, given: bool = True) -> Linear:
        dim, ffn = self.shape.dim, self.shape.ffn_dim
        inputs, outputs = {"ffn.0": (dim, ffn), "ffn.2": (ffn, dim)}.get(name, (dim, dim))
        return Linear(
            inputs=inputs,
            outputs=outputs,
            adapter=self.trained.adapter(name),
            trained=name in self.trained.own,
            input_gradient=given,
            fp8=self.shape.fp8,
        )

    def _attention(self, rows: int) -> Attention:
        shape = self.shape
        padded = -(-rows // shape.batch // _FLASH_ROWS) * _FLASH_ROWS
        return Attention(
            rows=rows,
            dim=shape.dim,
            heads=shape.heads,
            workspace=4 * shape.batch * padded * (shape.dim + shape.heads),
            kept_result=self.keep_attention,
            known_result=self.attention_known,
        )

    def _sum(self, first: Buffer | None, second: Buffer | None) -> Buffer | None:
        if first is None and second is None:
            return None
        return self.operators.add(first, second)


def _there(buffer: Buffer | None) -> Buffer:
    assert buffer is not None, "everything behind a trained layer has a gradient"
    return buffer
