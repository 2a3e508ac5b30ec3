"""Bytes that are alive while operators run one after the other, forward and backward.

A model of what autograd keeps, not of what it computes: an operator of `operators` takes buffers,
keeps those that its backward reads, and says what its backward takes in turn. So a block is written
down once, in the order of the real one, and its peak follows for every size and setting.
"""

from __future__ import annotations


class Buffer:
    """A storage with as many owners as `references`."""

    __slots__ = ("references", "size")

    def __init__(self, size: float) -> None:
        self.size = size
        self.references = 1


class Ledger:
    """Counts live bytes and remembers the most there were.

    Attributes:
        now: bytes alive.
        peak: the largest `now` since `start_peak`.
        gradients: bytes of parameters' gradients made so far, part of `now`.
        recording: whether operators keep what their backward needs.
        adding: gradients are added to those that are there.
        in_place: without gradients operators write where nobody reads any more.
    """

    def __init__(self, *, recording: bool = True, in_place: bool = False) -> None:
        self.now = 0.0
        self.peak = 0.0
        self.gradients = 0.0
        self.recording = recording
        self.adding = False
        self.in_place = in_place

    def start_peak(self) -> None:
        """Forget the peak so far."""
        self.peak = self.now

    def new(self, size: float) -> Buffer:
        """Make a buffer with one owner."""
        self.now += size
        self.peak = max(self.peak, self.now)
        return Buffer(size)

    def over(self, buffer: Buffer) -> Buffer:
        """Make a buffer of the size of one that is read for the last time, in place if it may."""
        return self.share(buffer) if self.in_place else self.new(buffer.size)

    def known(self, size: float) -> Buffer:
        """Return a buffer with one owner that has been counted before."""
        return Buffer(size)

    def share(self, buffer: Buffer) -> Buffer:
        """Add an owner."""
        buffer.references += 1
        return buffer

    def keep(self, buffer: Buffer) -> Buffer | None:
        """Add the backward as an owner; none while nothing is recorded."""
        return self.share(buffer) if self.recording else None

    def drop(self, *buffers: Buffer | None) -> None:
        """Take an owner away from each; a buffer without owners is gone."""
        for buffer in buffers:
            if buffer is None:
                continue
            buffer.references -= 1
            if buffer.references == 0:
                self.now -= buffer.size

    def touch(self, size: float) -> None:
        """Make a buffer that is gone at once."""
        self.peak = max(self.peak, self.now + size)

    def gradient(self, size: float) -> None:
        """Make a parameter's gradient, which stays."""
        if self.adding:
            self.touch(size)
            return
        self.now += size
        self.gradients += size
        self.peak = max(self.peak, self.now)
