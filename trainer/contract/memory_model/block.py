"""The memory of one transformer block: `trainer.models.wan.block.WanBlock` in bytes.

The order of operators and what local variables hold are those of the real forward; a change there
is a change here, and the oracle of `tests/memory` notices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from trainer.contract.memory_model.ledger import Buffer, Ledger
from trainer.contract.memory_model.operators import (
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

    rank: int = 0
    targets: frozenset[str] = frozenset()
    """Layers with a LoRA, such as `self_attn.q`."""
    everything: bool = False
    """The block's own weights."""

    @property
    def something(self) -> bool:
        """Whether the block trains at all."""
        return self.everything or bool(self.targets)


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
    shape: BlockShape, trained: Trained, *, keep_attention: bool = False
) -> BlockProfile:
    """Return the bytes of a forward that keeps nothing but, if wanted, attention outputs."""
    ledger = Ledger(recording=False)
    block = _Block(ledger, shape, trained, first=True, keep_attention=keep_attention)
    out, _ = block.forward(Buffer(0))
    ledger.drop(out)
    return BlockProfile(ledger.peak, ledger.now, 0, 0)


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
        self.input_gradient = not first or trained.everything
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
        full = self.trained.everything
        by_time = Affine(fused=self.shape.batch == 1, trained=full)
        normed, norm1 = op.norm(x, size, by_time)
        update, attend = self._self_attention(normed)
        tokens, gate1 = op.gate(update, size, trained=full)
        normed3, norm3 = op.norm(tokens, size, Affine(trained=full))
        seen, see = self._cross_attention(normed3)
        drop(normed3)
        summed = self.ledger.new(size)
        drop(seen, tokens)
        fed, norm2 = op.norm(summed, size, by_time)
        drop(normed)
        product, feed = self._feed_forward(fed, unused=recomputing and not full)
        out, gate2 = op.gate(product, size, trained=full, unused=recomputing)
        drop(product, summed, update, fed)

        def backward(grad: Buffer) -> None:
            grad = op.add(grad, norm2(_there(feed(gate2()))))
            grad = op.add(grad, norm3(see(self.ledger.share(grad))))
            normed_grad = attend(gate1())
            if normed_grad is not None:
                grad = op.add(grad, norm1(normed_grad))
            drop(grad)

        return out, backward

    def _feed_forward(self, x: Buffer, *, unused: bool) -> tuple[Buffer, Backward]:
        chunks = self.shape.chunks
        if chunks == 1:
            return self._feed_part(x, self.shape.rows, unused=unused)
        ledger, size = self.ledger, self.shape.tokens_bytes
        rows = -(-self.shape.rows // chunks)
        recording, ledger.recording = ledger.recording, False
        # A recomputation ends where the last part's input is saved.
        made = [self._feed_part(x, rows, unused=False)[0] for _ in range(chunks - unused)]
        ledger.recording = recording
        product = ledger.new(0 if unused else size)
        ledger.drop(*made)
        kept = ledger.keep(x)

        def backward(grad: Buffer) -> Buffer:
            grads = []
            for number in range(chunks):
                ledger.adding = number > 0
                out, part = self._feed_part(Buffer(0), rows, unused=not self.trained.everything)
                ledger.drop(out)
                grads.append(part(Buffer(0)))
            ledger.adding = False
            given = ledger.new(size)
            ledger.drop(grad, kept, *grads)
            return given

        return product, backward

    def _feed_part(self, x: Buffer, rows: int, *, unused: bool) -> tuple[Buffer, Backward]:
        op, drop = self.operators, self.ledger.drop
        hidden, up = op.linear(x, rows, self._layer("ffn.0"))
        active, activate = op.activation(hidden)
        drop(hidden)
        product, down = op.linear(active, rows, self._layer("ffn.2"), unused=unused)
        drop(active)

        def backward(grad: Buffer) -> Buffer | None:
            return up(_there(activate(_there(down(grad)))))

        return product, backward

    def _self_attention(self, x: Buffer) -> tuple[Buffer, Backward]:
        op, drop, rows = self.operators, self.ledger.drop, self.shape.rows
        turned = self.shape.dim // self.shape.heads
        given = self.input_gradient
        query, back_query = self._normed("self_attn.q", x, rows, turned=turned, given=given)
        key, back_key = self._normed("self_attn.k", x, rows, turned=turned, given=given)
        value, back_value = op.linear(x, rows, self._layer("self_attn.v", given=given))
        mixed, attend = op.attention(query, key, value, self._attention())
        update, out = op.linear(mixed, rows, self._layer("self_attn.o"))
        drop(mixed, query, key, value)

        def backward(grad: Buffer) -> Buffer | None:
            query_grad, key_grad, value_grad = attend(_there(out(grad)))
            total = back_value(value_grad)
            total = self._sum(total, back_key(key_grad))
            return self._sum(total, back_query(query_grad))

        return update, backward

    def _cross_attention(self, x: Buffer) -> tuple[Buffer, Callable[[Buffer], Buffer]]:
        op, drop, rows = self.operators, self.ledger.drop, self.shape.rows
        query, back_query = self._normed("cross_attn.q", x, rows)
        seen, see = self._look(query, self.shape.text_tokens, "")
        see_image = None
        if self.shape.image_tokens:
            image, see_image = self._look(query, self.shape.image_tokens, "_img")
            text, seen = seen, self.ledger.new(seen.size)
            drop(text, image)
        update, out = op.linear(seen, rows, self._layer("cross_attn.o"))
        drop(seen, query)

        def backward(grad: Buffer) -> Buffer:
            seen_grad = _there(out(grad))
            query_grad = None
            if see_image is not None:
                query_grad = see_image(self.ledger.share(seen_grad))
            query_grad = self._sum(query_grad, see(seen_grad))
            return _there(back_query(_there(query_grad)))

        return update, backward

    def _look(
        self, query: Buffer, tokens: int, suffix: str
    ) -> tuple[Buffer, Callable[[Buffer], Buffer]]:
        """Attend to text or image tokens; the backward gives the queries' gradient."""
        op, drop, rows = self.operators, self.ledger.drop, self.shape.batch * tokens
        outside, given = Buffer(0), self.trained.everything
        key, back_key = self._normed(f"cross_attn.k{suffix}", outside, rows, given=given)
        layer = self._layer(f"cross_attn.v{suffix}", given=given)
        value, back_value = op.linear(outside, rows, layer)
        seen, attend = op.attention(query, key, value, self._attention())
        drop(key, value)

        def backward(grad: Buffer) -> Buffer:
            query_grad, key_grad, value_grad = attend(grad)
            context_grad = self._sum(back_value(value_grad), back_key(key_grad))
            if context_grad is not None:
                self.ledger.touch(context_grad.size)
                drop(context_grad)
            return query_grad

        return seen, backward

    def _normed(
        self, name: str, x: Buffer, rows: int, *, turned: int = 0, given: bool = True
    ) -> tuple[Buffer, Backward]:
        """Project and norm queries or keys."""
        op = self.operators
        product, multiply = op.linear(x, rows, self._layer(name, given=given))
        norm = HeadNorm(dim=self.shape.dim, turned=turned, trained=self.trained.everything)
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
            rank=self.trained.rank if name in self.trained.targets else 0,
            trained=self.trained.everything,
            input_gradient=given,
            fp8=self.shape.fp8,
        )

    def _attention(self) -> Attention:
        shape = self.shape
        padded = -(-shape.tokens // _FLASH_ROWS) * _FLASH_ROWS
        return Attention(
            rows=shape.rows,
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
