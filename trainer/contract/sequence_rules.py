"""What goes with `distributed.sequence_parallel`: processes that share the tokens of a clip."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.contract.config import RunConfig
from trainer.contract.errors import Problem
from trainer.contract.variants import VARIANTS

SEQUENCE_KEY = "distributed.sequence_parallel"


def divisors(number: int) -> list[int]:
    """Return all divisors, ascending."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def uneven_heads(num_heads: int, num_processes: int) -> Problem | None:
    """Return what is wrong with dealing out a model's heads to so many processes."""
    if num_heads % num_processes == 0:
        return None
    return Problem(
        f"{num_processes} processes cannot share the {num_heads} attention heads of this model "
        "evenly",
        SEQUENCE_KEY,
        hint=f"set it to one of {', '.join(map(str, divisors(num_heads)))}",
    )


def sequence_rule(config: RunConfig) -> Iterator[Problem]:
    """Yield where shared clips and the rest of the config exclude one another."""
    distributed = config.distributed
    size = distributed.sequence_parallel
    if size == 1:
        return
    if distributed.engine == "local":
        yield Problem(
            "the local engine is one process, which has nobody to share a clip with",
            SEQUENCE_KEY,
            hint='set it to 1, or engine = "deepspeed"',
        )
    processes = distributed.num_processes
    # With a host file there are more processes than these; the run itself counts them.
    if processes is not None and distributed.hostfile is None and processes % size:
        yield Problem(
            f"num_processes = {processes} cannot be cut into groups of {size} that share clips",
            SEQUENCE_KEY,
            hint=f"set distributed.num_processes to a multiple of {size}, or sequence_parallel to "
            f"one of {', '.join(map(str, divisors(processes)))}",
        )
    known = VARIANTS.get(config.model.variant)
    if known is not None:
        heads = config.model.shape.get("num_heads", known.transformer.num_heads)
        problem = uneven_heads(int(heads), size)
        if problem is not None:
            yield problem
