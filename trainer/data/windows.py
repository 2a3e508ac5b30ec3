"""Windows: which runs of frames of a clip become items."""

from __future__ import annotations

from typing import NamedTuple

from trainer.contract.dataset_config import SourceOptions


class Window(NamedTuple):
    """`num_frames` consecutive frames from frame `start` on, counted after resampling."""

    start: int
    num_frames: int

    @property
    def frames(self) -> range:
        """The frame numbers."""
        return range(self.start, self.start + self.num_frames)


def round_down_frames(num_frames: int) -> int:
    """Return the largest 4n + 1 that is not above `num_frames`: what the VAE can encode whole."""
    return (num_frames - 1) // 4 * 4 + 1


def choose_windows(clip_frames: int, options: SourceOptions) -> list[Window]:
    """Return the windows of a clip of `clip_frames` frames; empty if every target is longer.

    head     [0, T)
    chunk    [0, T), [T, 2T), … while whole
    slide    every `frame_stride` frames
    uniform  `frame_sample` windows, evenly spread over the clip; 1 is head
    full     the whole clip, at most `max_frames`; `target_frames` do not count

    Windows that coincide (two targets that round to one length, more samples than places) count
    once.
    """
    if clip_frames < 1:
        return []
    if options.frame_extraction == "full":
        return [Window(0, round_down_frames(min(clip_frames, options.max_frames)))]
    lengths = sorted({round_down_frames(target) for target in options.target_frames})
    return [
        Window(start, length)
        for length in lengths
        if length <= clip_frames
        for start in _starts(clip_frames - length, length, options)
    ]


def shortest_window(options: SourceOptions) -> int:
    """Return the frames a clip needs to give any window at all."""
    if options.frame_extraction == "full":
        return 1
    return min(round_down_frames(target) for target in options.target_frames)


def _starts(last: int, length: int, options: SourceOptions) -> list[int]:
    if options.frame_extraction == "chunk":
        return list(range(0, last + 1, length))
    if options.frame_extraction == "slide":
        return list(range(0, last + 1, options.frame_stride))
    if options.frame_extraction == "uniform" and options.frame_sample > 1:
        gaps = options.frame_sample - 1
        return sorted({last * place // gaps for place in range(options.frame_sample)})
    return [0]
