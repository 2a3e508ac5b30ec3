"""The passes that a step of sampling makes through the transformer, told without torch.

The methods of guidance of `trainer.sampling` ask here when they act, and the estimate counts with
`passes_of_step`; a test keeps it equal to what the sampler does.
"""

from __future__ import annotations

from typing import Final

from trainer.contract.denoising_options import CFGSkipMode, DenoisingOptions

POSITIVE: Final = "positive"
"""The pass with the prompt."""
NEGATIVE: Final = "negative"
"""The pass with the negative prompt."""
SKIPPING: Final = "skipping"
"""The pass with the prompt that leaves blocks out."""


def passes_of_step(
    options: DenoisingOptions, guidance_scale: float, index: int, num_steps: int
) -> dict[str, frozenset[int]]:
    """Return the passes of a step, each with the blocks that it leaves out; {}: nothing moves.

    A step cache may spare some of them.

    Args:
        options: of the video.
        guidance_scale: of the expert that works.
        index: the step, from 0.
        num_steps: evaluations of the velocity in the whole walk.
    """
    if options.cfg_zero_star and index < options.cfg_zero_init_steps:
        return {}
    passes: dict[str, frozenset[int]] = {POSITIVE: frozenset()}
    guided = guided_steps(options.cfg_skip_mode, options.cfg_apply_ratio, num_steps)
    if guidance_scale != 1 and guided[index]:
        passes[NEGATIVE] = frozenset()
    if skips_layers(options.slg_start, options.slg_end, index, num_steps):
        layers = frozenset(options.slg_layers)
        if options.slg_mode == "original":
            passes[SKIPPING] = layers
        elif options.slg_mode == "uncond" and NEGATIVE in passes:
            passes[NEGATIVE] = layers
    return passes


def skips_layers(start: float, end: float, index: int, num_steps: int) -> bool:
    """Return whether skip-layer guidance acts at a step, given its shares of the steps."""
    return int(start * num_steps) <= index < int(end * num_steps)


def guided_steps(mode: CFGSkipMode, ratio: float, num_steps: int) -> list[bool]:
    """Return for each step whether it has guidance; `ratio` of all do.

    `early`, `late`, `middle` and `early_late` name the steps that go without. `alternate` deals the
    guided ones out evenly, by a sum that is carried along in floating point, as musubi-tuner does:
    where the ratio cannot be written exactly, one step less may be guided.
    """
    if mode == "alternate":
        return _alternate(ratio, num_steps)
    guided = round(ratio * num_steps)
    skipped = num_steps - guided
    if mode == "early":
        return [False] * skipped + [True] * guided
    if mode == "late":
        return [True] * guided + [False] * skipped
    if mode == "middle":
        first = guided // 2
        return [True] * first + [False] * skipped + [True] * (guided - first)
    if mode == "early_late":
        first = skipped // 2
        return [False] * first + [True] * guided + [False] * (skipped - first)
    return [True] * num_steps


def _alternate(ratio: float, num_steps: int) -> list[bool]:
    carried, steps = 0.0, []
    for _ in range(num_steps):
        carried += ratio
        steps.append(carried >= 1)
        carried %= 1
    return steps
