"""What check and cache say about a dataset of very many sizes still fits into events."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.contract.config import RunConfig
from trainer.contract.events import encode
from trainer.contract.variants import VARIANTS
from trainer.data.buckets import Bucket
from trainer.data.cache_index import Unneeded
from trainer.data.checks import BucketSummary, DatasetCheck
from trainer.jobs import check
from trainer.jobs.base import MAX_LISTED
from trainer.jobs.cache import CacheReport
from trainer.jobs.cache_run import emit_report

BUCKETS = [Bucket(1024 + 16 * number, 1024, 81) for number in range(5000)]


class Events(list[dict[str, Any]]):
    def __call__(self, kind: str, /, **fields: Any) -> None:
        encode(kind, **fields)
        self.append({"type": kind, **fields})


def test_a_cache_report_is_an_event_whatever_the_number_of_buckets() -> None:
    report = CacheReport(
        encoded=5000,
        reused=0,
        adopted=0,
        removed=Unneeded(),
        unneeded=Unneeded(),
        captions_encoded=1,
        captions_reused=0,
        captions_adopted=0,
        exported=0,
        buckets=dict.fromkeys(BUCKETS, 1),
        problems=(),
        notes=(),
    )
    said = Events()
    emit_report(report, said)
    end = said[-1]
    assert (end["num_buckets"], len(end["buckets"])) == (5000, MAX_LISTED)


def test_a_check_lists_the_largest_buckets_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tuple(
        BucketSummary(bucket=bucket, items=1, tokens=10**6 - number)
        for number, bucket in enumerate(BUCKETS)
    )
    checked = DatasetCheck(clips=5000, buckets=rows, batches_per_epoch=5000, problems=(), notes=())
    monkeypatch.setattr(check, "check_dataset", lambda dataset, variant, **rest: checked)
    source = {"video_directory": "clips", "target_frames": [81]}
    config = RunConfig.model_validate({"dataset": {"sources": [source]}})
    said = Events()
    summary = check._dataset(config, VARIANTS["wan2.1-t2v-1.3b"], [], said)
    said("end", **summary)
    assert said[0]["message"] == f"the largest {MAX_LISTED} of 5000 buckets are listed"
    assert [row["bucket"] for row in said[-1]["buckets"]] == [str(b) for b in BUCKETS[:MAX_LISTED]]
