"""What the processes of a sampling run tell each other, with a store and without processes."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from trainer.contract.config import RunConfig
from trainer.contract.errors import ConfigError, NonFiniteError, RunError
from trainer.contract.variants import get_variant
from trainer.engine.process_group import World
from trainer.jobs.base import explain
from trainer.jobs.sample import Part, Sample
from trainer.jobs.sample_ranks import SampleRanks, in_words, num_sampling_processes
from trainer.sampling.pipeline import Evaluations
from trainer.sampling.requests import SampleRequest

REQUESTS = tuple(
    SampleRequest.of(text, get_variant("wan2.1-t2v-1.3b"), index=index)
    for index, text in enumerate(("one", "two", "three"))
)


EVALUATIONS = Evaluations(computed=4, reused=1)


class Talk:
    """Two ranks in one process, and what the first of them said to the reader."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        store = torch._C._distributed_c10d.HashStore()
        monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
        self.events: list[dict[str, Any]] = []
        self.counts: list[tuple[str, int, int]] = []
        self.first, self.second = (
            SampleRanks(
                World(rank, 2, rank, torch.device("cpu")),
                lambda kind, /, **fields: self.events.append({"type": kind, **fields}),
                lambda *counts: self.counts.append(counts),
            )
            for rank in range(2)
        )

    def end(self, error: BaseException | None = None) -> list[Sample]:
        """Let both end, the second with an error; return what the first knows then."""
        words = in_words(error, explain) if error is not None else ""
        mine = [Sample(Path("b"), REQUESTS[1], EVALUATIONS, 1)]
        other = threading.Thread(target=self.second.end, args=(mine, REQUESTS, words))
        other.start()
        try:
            own = [
                Sample(Path("a"), REQUESTS[0], EVALUATIONS, 0),
                Sample(Path("c"), REQUESTS[2], EVALUATIONS, 2),
            ]
            return self.first.end(own, REQUESTS)
        finally:
            other.join(timeout=60)
            assert not other.is_alive()


def test_the_first_speaks_for_both(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Talk(monkeypatch)
    assert (talk.first.part, talk.second.part) == (Part(rank=0, size=2), Part(rank=1, size=2))
    assert [talk.second.part.has(index) for index in range(3)] == [False, True, False]
    for ranks in (talk.first, talk.second):
        ranks.emit_first("log", message="alike")
    talk.second.emit("sample", path="b")
    talk.second.progress("steps", 3, 10)
    assert talk.events == [{"type": "log", "message": "alike"}]
    talk.first.progress("steps", 2, 20)
    assert talk.counts[-1] == ("steps", 5, 30)
    assert talk.events[-1] == {"type": "sample", "path": "b"}
    samples = talk.end()
    assert [(one.path.name, one.request.prompt) for one in samples] == [
        ("a", "one"),
        ("b", "two"),
        ("c", "three"),
    ]


@pytest.mark.parametrize(
    ("error", "raised", "words"),
    [
        (NonFiniteError("it became NaN", hint="do this"), NonFiniteError, "it became NaN"),
        (ZeroDivisionError("by zero"), RunError, "rank 1 failed: ZeroDivisionError: by zero"),
        (KeyboardInterrupt(), KeyboardInterrupt, "^$"),
    ],
)
def test_what_the_second_failed_with_is_raised_by_the_first(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, raised: Any, words: str
) -> None:
    with pytest.raises(raised, match=words) as caught:
        Talk(monkeypatch).end(error)
    if raised is NonFiniteError:
        assert caught.value.hint == "do this"


def test_no_more_processes_than_there_is_work() -> None:
    def number(num_samples: int, **distributed: Any) -> int:
        section = {"device": "cpu", "engine": "deepspeed", **distributed}
        config = RunConfig.model_validate({"distributed": section})
        return num_sampling_processes(config, num_samples)

    assert number(5) == 1
    assert number(5, num_processes=2) == 2
    assert number(1, num_processes=4) == 1
    assert number(1, num_processes=4, sequence_parallel=2) == 2
    assert number(2, num_processes=4, sequence_parallel=2) == 4
    with pytest.raises(ConfigError, match=r"sequence_parallel is 2.*1 process here"):
        number(1, sequence_parallel=2)
