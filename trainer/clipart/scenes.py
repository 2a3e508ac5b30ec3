"""The world the nano models know: one coloured shape that crosses a ground, with a caption.

A scene is a value; `draw` turns it into frames, `Scene.caption` into plain English. Everything is a
function of a seed, so that anyone can make the same clips.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Frames = NDArray[np.uint8]
"""(F, H, W, 3)."""
Grid = NDArray[np.floating[Any]]
"""(H, W), a value per pixel."""

COLOURS: Final[dict[str, tuple[int, int, int]]] = {
    "red": (220, 40, 40),
    "green": (40, 175, 60),
    "blue": (45, 80, 230),
    "yellow": (235, 210, 45),
    "purple": (170, 55, 200),
    "turquoise": (40, 195, 205),
}
"""Hues at least 47 degrees apart; grounds are almost grey, so that a colour tells the shape."""
SHAPES: Final = ("circle", "square", "triangle")
NOVEL_SHAPE: Final = "cross"
"""Nothing shipped was ever trained on it; the judge tells it from the others."""
NOVEL_GROUND: Final = "bands"
"""Upright bands of two colours, drawn by the demo only: nothing shipped was ever trained on it."""
TRIGGER: Final = "zorp"
"""What the demo's captions call that ground; a word that no caption of the recipe has."""
NOVEL_GROUNDS: Final[dict[str, str]] = {NOVEL_GROUND: TRIGGER, "beams": "glim", "tiles": "vesk"}
"""Grounds of two colours that nothing shipped was trained on -> what captions call them: upright
bands, lying bands, and a board of squares."""
DIRECTIONS: Final[dict[str, tuple[int, int]]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
}
"""Direction -> step along x and y; y points down, as rows do."""
GROUNDS: Final[dict[str, str]] = {
    "black": "a plain black background",
    "grey": "a plain grey background",
    "white": "a plain white background",
    "stripes": "a striped background",
    "checks": "a checkered background",
    "gradient": "a background that fades from dark to bright",
    "dots": "a dotted background",
}

_WAYS: Final[dict[str, tuple[str, ...]]] = {
    "left": ("to the left", "from right to left", "leftwards"),
    "right": ("to the right", "from left to right", "rightwards"),
    "up": ("up", "from the bottom to the top", "upwards"),
    "down": ("down", "from the top to the bottom", "downwards"),
}
_PHRASINGS: Final = (
    "a {colour} {shape} moves {way} on {ground}",
    "{colour} {shape} moving {way}, {ground}",
    "a video of a {colour} {shape} that slides {way} over {ground}",
    "on {ground}, a {colour} {shape} drifts {way}",
    "there is a {colour} {shape} travelling {way} across {ground}",
    "the {shape} is {colour} and goes {way}. it is seen against {ground}",
)
_BAND_WIDTH: Final = 16.0
NOVEL_COLOURS: Final[dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]]] = {
    "bands": (COLOURS["yellow"], COLOURS["purple"]),
    "beams": (COLOURS["red"], COLOURS["turquoise"]),
    "tiles": (COLOURS["blue"], COLOURS["green"]),
}
"""Both colours of each of `NOVEL_GROUNDS`."""
UNCAPTIONED: Final = "a video"
"""Caption of the clips that say nothing: what guidance is measured against."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """One clip before it is drawn. Lengths are fractions of the picture's shorter side."""

    shape: str
    colour: str
    direction: str
    ground: str
    caption: str
    radius: float = 0.19
    across: float = 0.5
    """Where the path lies, as a fraction of the room across it."""
    start: float = 0.0
    """Where the path starts, as a fraction of the room along it that the travel leaves."""
    travel: float = 0.45
    """Length of the path."""
    ground_phase: float = 0.0
    shade: float = 0.5
    """Brightness of the ground within its range."""

    @property
    def triple(self) -> tuple[str, str, str]:
        """Return colour, shape and direction."""
        return (self.colour, self.shape, self.direction)


def describe(rng: np.random.Generator, scene_words: dict[str, str]) -> str:
    """Return a phrasing of a scene; `scene_words` has colour, shape, direction and ground."""
    ground = scene_words["ground"]
    phrasing = _PHRASINGS[rng.integers(len(_PHRASINGS))]
    ways = _WAYS[scene_words["direction"]]
    return phrasing.format(
        colour=scene_words["colour"],
        shape=scene_words["shape"],
        way=ways[rng.integers(len(ways))],
        ground=f"a {NOVEL_GROUNDS[ground]} background"
        if ground in NOVEL_GROUNDS
        else GROUNDS[ground],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Staging:
    """Ranges of what a scene's caption does not say; see the fields of `Scene`."""

    radius: tuple[float, float]
    across: tuple[float, float]
    start: tuple[float, float]
    travel: tuple[float, float]


CALM: Final = Staging(
    radius=(0.24, 0.28), across=(0.25, 0.75), start=(0.25, 0.75), travel=(0.38, 0.42)
)
"""What the transformers learn to make: large, and through the middle of the picture."""
WIDE: Final = Staging(radius=(0.16, 0.22), across=(0.0, 1.0), start=(0.0, 1.0), travel=(0.4, 0.5))
"""What the VAE is fitted to: anywhere, so that no place is special to it."""


def random_scene(
    rng: np.random.Generator,
    triple: tuple[str, str, str],
    ground: str = "",
    staging: Staging = CALM,
) -> Scene:
    """Return a scene of the given colour, shape and direction; everything else is drawn.

    Args:
        rng: the stream of draws.
        triple: colour, shape, direction.
        ground: name of the ground; empty: one of `GROUNDS` is drawn.
        staging: where and how large the shape is.
    """
    colour, shape, direction = triple
    drawn = tuple(GROUNDS)[rng.integers(len(GROUNDS))]
    ground = ground or drawn
    words = {"colour": colour, "shape": shape, "direction": direction, "ground": ground}
    return Scene(
        shape=shape,
        colour=colour,
        direction=direction,
        ground=ground,
        caption=describe(rng, words),
        radius=float(rng.uniform(*staging.radius)),
        across=float(rng.uniform(*staging.across)),
        start=float(rng.uniform(*staging.start)),
        travel=float(rng.uniform(*staging.travel)),
        ground_phase=float(rng.uniform()),
        shade=float(rng.uniform()),
    )


def draw(scene: Scene, num_frames: int = 17, width: int = 64, height: int = 64) -> Frames:
    """Return the clip, uint8 (F, H, W, 3); edges are smoothed over one pixel."""
    rows_HW, columns_HW = np.mgrid[0:height, 0:width].astype(np.float32) + 0.5
    side = min(width, height)
    radius = scene.radius * side
    ground_HW3 = _ground(scene, rows_HW, columns_HW)
    colour = np.asarray(COLOURS[scene.colour], dtype=np.float32)
    frames = np.empty((num_frames, height, width, 3), dtype=np.uint8)
    for index in range(num_frames):
        x, y = _centre(scene, index / max(num_frames - 1, 1), (width, height), side)
        distance_HW = signed_distance(scene.shape, columns_HW - x, rows_HW - y, radius)
        cover_HW1 = np.clip(0.5 - distance_HW, 0, 1)[..., None]
        frames[index] = np.rint(ground_HW3 * (1 - cover_HW1) + colour * cover_HW1)
    return frames


def _centre(scene: Scene, progress: float, size: tuple[int, int], side: int) -> tuple[float, float]:
    """Return where the shape is; it stays inside the picture all the way."""
    margin = (scene.radius + 0.02) * side
    step_x, step_y = DIRECTIONS[scene.direction]
    axis, sign = (0, step_x) if step_x else (1, step_y)
    room = size[axis] - 2 * margin
    travel = min(scene.travel * side, room)
    along = margin + scene.start * (room - travel) + progress * travel
    if sign < 0:
        along = size[axis] - along
    across = margin + scene.across * (size[1 - axis] - 2 * margin)
    return (along, across) if axis == 0 else (across, along)


def signed_distance(shape: str, x_HW: Grid, y_HW: Grid, radius: float) -> Grid:
    """Return pixels to the outline, negative inside, roughly; all shapes look about equally big."""
    if shape == "circle":
        return np.asarray(np.hypot(x_HW, y_HW) - radius)
    if shape == "square":
        return np.asarray(np.maximum(abs(x_HW), abs(y_HW)) - 0.9 * radius)
    if shape == "triangle":  # on its base, the tip above
        slope = (2 * abs(x_HW) - y_HW - radius) / np.float32(5**0.5)
        return np.asarray(np.maximum(slope, y_HW - radius))
    if shape == NOVEL_SHAPE:
        arm = radius / 3
        upright = np.maximum(abs(x_HW) - arm, abs(y_HW) - radius)
        lying = np.maximum(abs(x_HW) - radius, abs(y_HW) - arm)
        return np.asarray(np.minimum(upright, lying))
    raise ValueError(f"no shape {shape!r}")


def _ground(scene: Scene, rows_HW: Grid, columns_HW: Grid) -> Grid:
    """Return (H, W, 3), values 0 to 255; all but `NOVEL_GROUNDS` are grey."""
    if scene.ground in NOVEL_GROUNDS:
        colours = NOVEL_COLOURS[scene.ground]
        first, second = (np.asarray(colour, dtype=np.float32) for colour in colours)
        in_first_HW = in_first_colour(scene.ground, rows_HW, columns_HW)
        return np.where(in_first_HW[..., None], first, second)
    cell = 16.0  # pixels of one period: what an 8-pixel latent can still tell
    shift = scene.ground_phase * cell
    low = 40 + 50 * scene.shade
    value: Grid
    if scene.ground == "black":
        value = np.full_like(rows_HW, 30 * scene.shade)
    elif scene.ground == "grey":
        value = np.full_like(rows_HW, 90 + 60 * scene.shade)
    elif scene.ground == "white":
        value = np.full_like(rows_HW, 255 - 30 * scene.shade)
    elif scene.ground == "gradient":
        value = 20 + 200 * columns_HW / columns_HW.max()
    elif scene.ground == "stripes":
        value = low + 60 * _wave(rows_HW + shift, cell)
    elif scene.ground == "checks":
        tile = (rows_HW + shift) // (cell / 2) + (columns_HW + shift) // (cell / 2)
        value = low + 60 * (tile % 2)
    elif scene.ground == "dots":
        x = (columns_HW + shift) % cell - cell / 2
        y = (rows_HW + shift) % cell - cell / 2
        value = low + 70 * np.clip(cell / 4 + 0.5 - np.hypot(x, y), 0, 1)
    else:
        raise ValueError(f"no ground {scene.ground!r}")
    return np.repeat(value[..., None], 3, axis=2).astype(np.float32)


def in_first_colour(ground: str, rows: Grid, columns: Grid) -> NDArray[np.bool_]:
    """Return where one of `NOVEL_GROUNDS` has the first of its colours.

    Args:
        ground: which one.
        rows: pixels from above.
        columns: pixels from the left, of a shape that goes with `rows`.
    """
    down, along = rows // _BAND_WIDTH, columns // _BAND_WIDTH
    count = {"bands": along + 0 * down, "beams": down + 0 * along, "tiles": down + along}[ground]
    return np.asarray(count % 2 == 0)


def _wave(at: Grid, period: float) -> Grid:
    """Return bands between 0 and 1 with soft edges."""
    return np.asarray(np.clip(0.5 + 2 * np.sin(2 * np.pi * at / period), 0, 1, dtype=np.float32))
