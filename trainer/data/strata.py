"""Draws of sigma that are spread evenly instead of independently: which quantile each item gets.

Places in the stream of items are grouped; a group of B places meets each of B equally likely parts
of the sampler's distribution once. B is the number of items of an epoch ("stratified", as in
diffusion-pipe's quantile table), or a small number (musubi-tuner's `num_timestep_buckets`). A place
taken at random has a uniform quantile either way, so the distribution of sigma stays as it is; sums
over a group vary less, because parts are neither met twice nor left out.

The parts of a group come in the order of van der Corput's sequence, turned by a random number of
parts: items that follow each other, hence those of one step, are far apart. Everything is a
function of the seed and of the place, so ranks agree and a resumed run goes on in the middle of a
group.
"""

from __future__ import annotations

from functools import lru_cache

from trainer.core.rng import derive_seed

_RESOLUTION = 1 << 53


def quantile_at(seed: int, place: int, group_size: int) -> float:
    """Return the quantile in [0, 1) of one place in the stream of items.

    Args:
        seed: of the run.
        place: number of the item in the stream, from 0, all ranks together.
        group_size: B.
    """
    group, member = divmod(place, group_size)
    turn = derive_seed(seed, "quantile group", group) % group_size
    part = (_spread(group_size)[member] + turn) % group_size
    within = derive_seed(seed, "quantile", place) % _RESOLUTION / _RESOLUTION
    return min((part + within) / group_size, 1 - 1 / _RESOLUTION)


@lru_cache(maxsize=4)
def _spread(size: int) -> tuple[int, ...]:
    """Return 0 … size - 1 in an order in which each beginning is spread over the whole.

    It is the order of the ranks of van der Corput's sequence in base 2: bits read backwards.
    """
    width = max(size - 1, 1).bit_length()
    backwards = [int(f"{number:0{width}b}"[::-1], 2) for number in range(size)]
    order = sorted(range(size), key=backwards.__getitem__)
    ranks = [0] * size
    for rank, number in enumerate(order):
        ranks[number] = rank
    return tuple(ranks)
