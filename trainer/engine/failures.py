"""What one process failed with, told to the others: all they see is a lost connection."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch.distributed as dist

from trainer.contract import errors
from trainer.contract.errors import MenmaError, RunError
from trainer.engine.process_group import World

_KEY = "menma/failure"
_MAX_CHARS = 8000
_LOST = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")


@contextmanager
def failing_together(
    world: World, explain: Callable[[BaseException], MenmaError | None]
) -> Iterator[None]:
    """Let every rank fail with what the first of them failed with.

    A rank that fails leaves its error in the group's store before it gives the group up; the
    others, whose collective call then breaks off, raise that error instead of "connection closed".

    Args:
        world: this process's place.
        explain: returns the error for people that an exception stands for, None for bugs.

    Raises:
        MenmaError: this rank's error as `explain` has it, or another rank's.
        RunError: another process is gone without a word.
        KeyboardInterrupt: another rank was interrupted.
    """
    try:
        yield
    except BaseException as error:
        known = explain(error)
        if world.world_size > 1:
            if known is None and _is_lost_connection(error):
                raise _cause(error) from error
            _tell(world, known or error)
        if known is None or known is error:
            raise
        raise known from error


def _is_lost_connection(error: BaseException) -> bool:
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _LOST)


def _tell(world: World, error: BaseException) -> None:
    own = isinstance(error, MenmaError | KeyboardInterrupt)
    words = str(error) if own else f"{type(error).__name__}: {error}"
    told = {
        "kind": type(error).__name__ if own else "",
        "rank": world.rank,
        "message": (error.message if isinstance(error, MenmaError) else words)[:_MAX_CHARS],
        "hint": (error.hint if isinstance(error, MenmaError) else "")[:_MAX_CHARS],
    }
    with suppress(RuntimeError):  # the store may have died with the rank that held it
        store = _store()
        if not store.check([_KEY]):  # the first failure is the cause of the others
            store.set(_KEY, json.dumps(told))


def _cause(lost: BaseException) -> BaseException:
    told: dict[str, Any] = {}
    with suppress(RuntimeError):
        store = _store()
        if store.check([_KEY]):
            told = json.loads(store.get(_KEY))
    if not told:
        return _without_a_word(lost)
    if told["kind"] == "KeyboardInterrupt":
        return KeyboardInterrupt()
    kind = getattr(errors, told["kind"], None)
    if kind is None:
        return RunError(
            f"rank {told['rank']} failed: {told['message']}",
            hint="this is a bug of Menma; the log of the console holds the traceback",
        )
    cause: MenmaError = kind(told["message"], hint=told["hint"])
    return cause


def _without_a_word(lost: BaseException) -> RunError:
    # gloo begins with a place in its source and ends with good wishes.
    first = next(iter(str(lost).strip().splitlines()), type(lost).__name__)
    reason = re.sub(r"^\[[^\]]*\] ?", "", first).partition(". This is typically")[0]
    if "timed out" in reason.lower():
        return RunError(
            f"another process of this run does not answer: {reason}",
            hint="it hangs, or is busy for longer than distributed.timeout_s (say, with a sample)",
        )
    return RunError(
        f"the connection to another process of this run broke off: {reason}",
        hint="that process was killed (no memory left on the host?) or crashed; the log of the "
        "console may hold its last words",
    )


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()
