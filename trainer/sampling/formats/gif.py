"""GIF with a palette for each frame; what made it is in the comment extension."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import ClassVar

import av
from av.filter import Graph

from trainer.contract.files import atomic_path
from trainer.sampling.formats.base import Bits, Content, require_encoder
from trainer.sampling.video_io import AnyFrame, as_json

_COLOURS = 256
_HEAD = 13
"""Bytes of the header and the logical screen descriptor."""
_PALETTE_FLAG, _PALETTE_SIZE = 0x80, 0x07


class GIF:
    """256 colours a frame, dithered; loops without end."""

    bits: ClassVar[Bits] = 8

    @staticmethod
    def check() -> None:
        """See `SampleFormat`."""
        require_encoder("gif")

    @staticmethod
    def write(path: Path, content: Content) -> None:
        """Encode the frames; a lower quality has fewer colours. See `SampleFormat`."""
        frames = iter(content.frames)
        first = next(frames, None)
        if first is None:
            raise ValueError("a video needs a frame")
        # Delays are whole hundredths of a second; times, not delays, are rounded, so none adds up.
        rate = Fraction(content.fps).limit_denominator(1001)
        colours = max(2, _COLOURS * (content.quality or 100) // 100)
        height, width = first.shape[:2]
        with atomic_path(path) as temporary:
            with av.open(str(temporary), "w", format="gif", options={"loop": "0"}) as container:
                stream = container.add_stream("gif", rate=rate)
                stream.width, stream.height, stream.pix_fmt = width, height, "pal8"
                for picture in _with_palettes(chain([first], frames), rate, colours):
                    container.mux(stream.encode(picture))
                container.mux(stream.encode(None))
            if content.metadata:
                comment = as_json(content.metadata, ascii_only=True).encode()
                temporary.write_bytes(with_comment(temporary.read_bytes(), comment))


def with_comment(gif: bytes, comment: bytes) -> bytes:
    """Return the GIF with a comment extension behind its header, where readers look first."""
    flags = gif[10]
    palette = 3 * 2 ** ((flags & _PALETTE_SIZE) + 1) if flags & _PALETTE_FLAG else 0
    place = _HEAD + palette
    blocks = [comment[start : start + 255] for start in range(0, len(comment), 255)]
    extension = b"".join(bytes([len(block)]) + block for block in blocks)
    return gif[:place] + b"\x21\xfe" + extension + b"\x00" + gif[place:]


def _with_palettes(
    frames: Iterator[AnyFrame], rate: Fraction, colours: int
) -> Iterator[av.VideoFrame]:
    graph: Graph | None = None
    for index, frame in enumerate(frames):
        if graph is None:
            graph = _graph(frame.shape[1], frame.shape[0], 1 / rate, colours)
        picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
        picture.pts, picture.time_base = index, 1 / rate
        graph.push(picture)
        yield from _pulled(graph)
    if graph is not None:
        graph.push(None)
        yield from _pulled(graph)


def _graph(width: int, height: int, time_base: Fraction, colours: int) -> Graph:
    graph = Graph()
    layout = av.VideoFormat("rgb24", width, height)
    source = graph.add_buffer(width=width, height=height, format=layout, time_base=time_base)
    split = graph.add("split")
    palette = graph.add(
        "palettegen", f"max_colors={colours}:reserve_transparent=0:stats_mode=single"
    )
    use = graph.add("paletteuse", "dither=sierra2_4a:new=1")
    source.link_to(split)
    split.link_to(palette, 0, 0)
    split.link_to(use, 1, 0)
    palette.link_to(use, 0, 1)
    use.link_to(graph.add("buffersink"))
    graph.configure()
    return graph


def _pulled(graph: Graph) -> Iterator[av.VideoFrame]:
    while True:
        try:
            picture = graph.pull()
        except (BlockingIOError, EOFError):  # needs another frame; has given all
            return
        if isinstance(picture, av.VideoFrame):
            yield picture
