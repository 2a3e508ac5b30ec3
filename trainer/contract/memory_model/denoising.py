"""What the passes of a video are given at a time, and what stays on the GPU between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

from trainer.contract.denoising_options import DenoisingOptions
from trainer.contract.memory_model.clips import Clip
from trainer.contract.memory_model.training import Parts
from trainer.contract.memory_model.workload import Workload
from trainer.contract.passes import NEGATIVE, passes_of_step
from trainer.contract.variants import Variant

Expert = Literal["low_noise", "high_noise"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Keeps:
    """What an expert keeps between its passes (`trainer.models.wan.kept`, step caches)."""

    texts: int = 0
    """Texts, embedded and as keys and values; one counts for each batch that it is in."""
    images: int = 0
    """The same of CLIP's images: samples of a batch, for each size of batch."""
    start: bool = False
    """Tokens behind the first block's self-attention, which a step's passes have in common."""
    residuals: int = 0
    """What the blocks added to the tokens in passes that are not in work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkingSet:
    """What a transformer works on at a time, without an optimizer."""

    clip: Clip
    """A whole batch."""
    keeps: Keeps = Keeps()
    ranks: int = 1
    """Processes that share its tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Passes:
    """All passes of a video, those that a step cache may spare included."""

    by_expert: tuple[tuple[Expert, int], ...]
    """Experts in the order they work, each with its passes; those without are left out."""
    batches: tuple[tuple[int, int], ...]
    """Passes that run as one batch -> how often as many do."""
    blocks_left_out: int
    """Blocks that skip-layer guidance leaves out, of all passes together."""
    keeps: Keeps
    """What is kept, at most."""

    @property
    def largest_batch(self) -> int:
        """Passes that run together, at most."""
        return max((size for size, _ in self.batches), default=1)


def plan_passes(
    options: DenoisingOptions,
    guidance_scale: tuple[float, float],
    timesteps: Sequence[float],
    variant: Variant,
    *,
    texts_alike: bool = False,
    one_frame: bool = False,
) -> Passes:
    """Return the passes of a video.

    Args:
        options: of the video.
        guidance_scale: of the low-noise and the high-noise expert.
        timesteps: of all evaluations of the velocity.
        variant: the model.
        texts_alike: prompt and negative prompt are the same.
        one_frame: the frame has another place in time than the first.
    """
    made: dict[Expert, list[dict[str, frozenset[int]]]] = {"high_noise": [], "low_noise": []}
    for index, timestep in enumerate(timesteps):
        high = variant.experts and timestep >= 1000 * variant.expert_boundary
        passes = passes_of_step(options, guidance_scale[high], index, len(timesteps))
        made["high_noise" if high else "low_noise"].append(passes)
    steps = [passes for own in made.values() for passes in own]
    sizes = Counter(len(batch) for passes in steps for batch in _batches(options, passes))
    starts = not (options.cfg_batch or one_frame) and options.step_cache == "none"
    kept = [_keeps(options, own, texts_alike=texts_alike) for own in made.values()]
    most = {field.name: max(getattr(one, field.name) for one in kept) for field in fields(Keeps)}
    counts: list[tuple[Expert, int]] = [(who, sum(map(len, own))) for who, own in made.items()]
    return Passes(
        by_expert=tuple(one for one in counts if one[1]),
        batches=tuple(sorted(sizes.items())),
        blocks_left_out=sum(len(blocks) for passes in steps for blocks in passes.values()),
        keeps=replace(Keeps(**most), start=starts and any(scale != 1 for scale in guidance_scale)),
    )


def kept_parts(work: Workload, working_set: WorkingSet, *, partitioned: bool = False) -> Parts:
    """Return the bytes of what is kept between passes.

    Args:
        work: the config's.
        working_set: what is worked on.
        partitioned: processes hold the weights in parts, and gather them in a fixed order.
    """
    shape, keeps = work.shape, working_set.keeps
    tokens = (
        -(-working_set.clip.tokens(work.variant) // working_set.ranks) * shape.dim * work.element
    )
    parts = {"step cache": float(keeps.residuals * tokens)}
    if work.swapped or partitioned or work.config.memory.compile_blocks:
        return parts  # `WanTransformer.remembering` remembers nothing then
    images = 2 if shape.image_position_embedding else 1
    rows = keeps.texts * shape.text_len
    if shape.image_dim:
        rows += keeps.images * images * shape.image_tokens
    # Each row as it is embedded, and as a key and a value of every block.
    parts["kept results"] = float(rows * shape.dim * work.element * (1 + 2 * shape.num_layers))
    if keeps.start and working_set.ranks == 1:
        parts["kept results"] += tokens
    return parts


def _batches(options: DenoisingOptions, passes: dict[str, frozenset[int]]) -> list[tuple[str, ...]]:
    """Return the passes of a step by what runs as one batch: what goes through the same blocks."""
    if not options.cfg_batch:
        return [(name,) for name in passes]
    groups: dict[frozenset[int], tuple[str, ...]] = {}
    for name, left_out in passes.items():
        groups[left_out] = (*groups.get(left_out, ()), name)
    return list(groups.values())


def _keeps(
    options: DenoisingOptions, steps: Sequence[dict[str, frozenset[int]]], *, texts_alike: bool
) -> Keeps:
    batches = {batch for passes in steps for batch in _batches(options, passes)}
    contexts = {tuple(name == NEGATIVE and not texts_alike for name in batch) for batch in batches}
    residuals = 0
    if options.step_cache != "none" and batches:
        kinds = {item for passes in steps for item in passes.items()}
        residuals = len(kinds) - max(map(len, batches))  # those of a batch go when it begins
    return Keeps(
        texts=sum(map(len, contexts)), images=sum(set(map(len, batches))), residuals=residuals
    )
