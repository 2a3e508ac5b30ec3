"""The processes of one sampling run: who makes which samples, and who speaks for all of them.

Prompts are dealt out, and no process waits for another in between: what is told goes through the
store of the process group, and only the first process writes events. Processes that share a video
(`distributed.sequence_parallel`) do wait for each other, in every layer.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch.distributed as dist

from trainer.contract import errors
from trainer.contract.config import RunConfig
from trainer.contract.errors import ConfigError, MenmaError, RunError
from trainer.contract.sequence_rules import SEQUENCE_KEY, divisors
from trainer.engine.launch import run_workers
from trainer.engine.process_group import World
from trainer.jobs.base import INTERRUPTED, Emit, Stopped
from trainer.jobs.build import num_processes
from trainer.jobs.sample import Part, Progress, Sample
from trainer.sampling.pipeline import Evaluations
from trainer.sampling.requests import SampleRequest

_POLL_S = 0.1
_FAILURE_GRACE_S = 120.0
"""How long the others may decode what they have drawn when one process is gone."""
_OVER = "menma/sampling/over"


def num_sampling_processes(config: RunConfig, num_samples: int) -> int:
    """Return how many processes are worth starting: a group for each sample at most.

    Raises:
        ConfigError: the processes cannot be cut into groups that share a video.
    """
    size, processes = config.distributed.sequence_parallel, num_processes(config)
    if processes % size:
        known = ", ".join(map(str, divisors(processes)))
        raise ConfigError(
            f"{SEQUENCE_KEY} is {size}, but sampling has {processes} "
            f"process{'' if processes == 1 else 'es'} here",
            hint=f"--set {SEQUENCE_KEY}=1, or one of {known}; or set distributed.num_processes",
        )
    return min(processes, size * num_samples)


def run_in_processes(num: int) -> None:
    """Start this very job `num` times, wait, and end as they end.

    Raises:
        Stopped: it was interrupted.
        SystemExit: a process failed, and has said why.
    """
    command = [sys.executable, "-m", "trainer", *sys.argv[1:]]
    code = run_workers(command, num, failure_grace_s=_FAILURE_GRACE_S)
    if code == INTERRUPTED:
        raise Stopped
    if code:
        raise SystemExit(code)


class SampleRanks:
    """One process's place, and its way to the reader of events. Alone it speaks for itself."""

    def __init__(self, world: World, emit: Emit, progress: Progress) -> None:
        """Take part.

        Args:
            world: this process's place.
            emit: sends an event; used by the first process.
            progress: reports counts of all processes together; likewise.
        """
        self._world, self._emit, self._progress = world, emit, progress
        self._store: Any = None
        if world.world_size > 1:
            self._store = dist.distributed_c10d._get_default_store()
        self._said = 0
        self._heard = dict.fromkeys(range(1, world.world_size), 0)
        self._counts: dict[str, dict[int, tuple[int, int]]] = {}
        self._ends: dict[int, dict[str, Any]] = {}

    @property
    def part(self) -> Part:
        """Which samples are this process's."""
        world = self._world
        return Part(
            rank=world.data_rank,
            size=world.data_size,
            is_shared=world.sequence is not None,
            writes=world.counts,
        )

    def emit_first(self, kind: str, /, **fields: Any) -> None:
        """Send an event that all processes have alike, once."""
        if self._world.rank == 0:
            self._emit(kind, **fields)

    def emit(self, kind: str, /, **fields: Any) -> None:
        """Send an event of this process's own samples; of a shared one once."""
        if self._world.rank == 0:
            self._emit(kind, **fields)
        elif self._world.counts:
            self._say({"kind": kind, "fields": fields})

    def progress(self, phase: str, done: int, total: int) -> None:
        """Report this process's counts; the first one reports the sums of all that it knows."""
        if self._world.rank == 0:
            self._count(0, phase, done, total)
            self._listen()
        elif self._world.counts:
            self._say({"progress": [phase, done, total]})

    def end(
        self, samples: Sequence[Sample], requests: Sequence[SampleRequest], error: str = ""
    ) -> list[Sample]:
        """Wait for all; return every process's samples in the order of the requests.

        Args:
            samples: this process's.
            requests: of the whole run.
            error: what this process failed with, from `in_words`; it raises that itself afterwards.

        Returns:
            The samples, on the first process; on the others their own.

        Raises:
            MenmaError: another process failed; on the first process, unless it failed itself.
        """
        world = self._world
        if world.world_size == 1:
            return list(samples)
        written = [[one.index, str(one.path), *astuple(one.evaluations)] for one in samples]
        if world.rank:
            self._say({"end": {"samples": written, "error": error}})
            while not self._store.check([_OVER]):
                time.sleep(_POLL_S)
            return list(samples)
        while len(self._ends) < world.world_size - 1:
            time.sleep(_POLL_S)
            self._listen()
        self._store.set(_OVER, "1")
        for told in self._ends.values():
            written += told["samples"]
        if not error:
            _raise_first(self._ends)
        return [
            Sample(Path(path), requests[i], Evaluations(*counts), i)
            for i, path, *counts in sorted(written)
        ]

    def _say(self, message: dict[str, Any]) -> None:
        self._store.set(_key(self._world.rank, self._said), json.dumps(message))
        self._said += 1

    def _listen(self) -> None:
        """Pass on what the others have said since."""
        for rank in self._heard:
            while self._store.check([key := _key(rank, self._heard[rank])]):
                self._heard[rank] += 1
                self._take(rank, json.loads(self._store.get(key)))

    def _take(self, rank: int, message: dict[str, Any]) -> None:
        if "end" in message:
            self._ends[rank] = message["end"]
        elif "progress" in message:
            self._count(rank, *message["progress"])
        else:
            self._emit(message["kind"], **message["fields"])

    def _count(self, rank: int, phase: str, done: int, total: int) -> None:
        counts = self._counts.setdefault(phase, {})
        counts[rank] = (done, total)
        self._progress(phase, *(sum(each) for each in zip(*counts.values(), strict=True)))


def in_words(error: BaseException, explain: Callable[[BaseException], MenmaError | None]) -> str:
    """Return what the first process needs to raise another's error."""
    known = explain(error)
    return json.dumps(
        {
            "kind": "" if known is None else type(known).__name__,
            "message": f"{type(error).__name__}: {error}" if known is None else known.message,
            "hint": "" if known is None else known.hint,
            "interrupted": isinstance(error, KeyboardInterrupt),
        }
    )


def _raise_first(ends: dict[int, dict[str, Any]]) -> None:
    for rank, end in sorted(ends.items()):
        if not end["error"]:
            continue
        told = json.loads(end["error"])
        if told["interrupted"]:
            raise KeyboardInterrupt
        kind = getattr(errors, told["kind"], None)
        if kind is None:
            raise RunError(
                f"rank {rank} failed: {told['message']}",
                hint="this is a bug of Menma; the log of the console holds the traceback",
            )
        raise kind(told["message"], hint=told["hint"])


def _key(rank: int, number: int) -> str:
    return f"menma/sampling/{rank}/{number}"
