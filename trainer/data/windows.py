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

    head         [0, T)
    middle       T frames with as many before them as behind them
    chunk        [0, T), [T, 2T), … while whole
    slide        every `frame_stride` frames
    overlapping  as few as hold every frame, neighbours sharing `frame_overlap` frames or more,
                 evenly spread from the first frame to the last
    uniform      `frame_sample` windows, evenly spread over the clip; 1 is head
    random       the same windows, of which the order of training takes one an epoch
    adaptive     one, from the middle: the longest 4n + 1 up to the largest target; the clip must
                 have room for the smallest target
    full         the whole clip, at most `max_frames`; `target_frames` do not count

    Windows that coincide (two targets that round to one length, more samples than places) count
    once.
    """
    if clip_frames < 1:
        return []
    if options.frame_extraction == "full":
        return [Window(0, round_down_frames(min(clip_frames, options.max_frames)))]
    lengths = sorted({round_down_frames(target) for target in options.target_frames})
    if options.frame_extraction == "adaptive":
        if clip_frames < lengths[0]:
            return []
        length = round_down_frames(min(clip_frames, lengths[-1]))
        return [Window((clip_frames - length) // 2, length)]
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


def takes_turns(options: SourceOptions) -> bool:
    """Tell whether windows of one length stand for each other: every epoch takes one of them."""
    return options.frame_extraction == "random"


def _starts(last: int, length: int, options: SourceOptions) -> list[int]:
    """Return the first frames of the windows of one length; the last possible one is `last`."""
    match options.frame_extraction:
        case "middle":
            return [last // 2]
        case "chunk":
            return list(range(0, last + 1, length))
        case "slide":
            return list(range(0, last + 1, options.frame_stride))
        case "overlapping":
            return _spread(last, -(-last // (length - options.frame_overlap)) + 1)
        case "uniform" | "random":
            return _spread(last, options.frame_sample)
        case _:
            return [0]


def _spread(last: int, count: int) -> list[int]:
    """Return `count` places from 0 to `last`, evenly spread, each once; one place is 0."""
    gaps = max(count - 1, 1)
    return sorted({last * place // gaps for place in range(count)})
