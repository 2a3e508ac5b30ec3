"""Which processes of a run share clips (`distributed.sequence_parallel`)."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import torch.distributed as dist

from trainer.attention.sequence import SequenceGroup
from trainer.contract.errors import ConfigError
from trainer.contract.sequence_rules import SEQUENCE_KEY, divisors
from trainer.engine.process_group import World


def sharing_clips(world: World, size: int, timeout_s: float) -> World:
    """Return `world` with groups of `size` processes that share clips. A collective call.

    Neighbours form a group: 0 … size - 1, then the next. On one machine they are the GPUs that
    are closest to each other, and no group spans two machines whose GPUs `size` divides.

    Raises:
        ConfigError: the processes cannot be cut into such groups.
    """
    if size == 1:
        return world
    if world.world_size % size:
        raise ConfigError(
            f"{SEQUENCE_KEY} is {size}, but this run has {world.world_size} process"
            + ("es" if world.world_size > 1 else ""),
            hint=f"give it a multiple of {size} GPUs (--gpus, distributed.num_processes), or set "
            f"sequence_parallel to one of {', '.join(map(str, divisors(world.world_size)))}",
        )
    # Every process takes part in making every group.
    groups = [
        dist.new_group(list(range(first, first + size)), timeout=timedelta(seconds=timeout_s))
        for first in range(0, world.world_size, size)
    ]
    own = SequenceGroup(world.rank % size, size, groups[world.rank // size])
    return replace(world, sequence=own)
