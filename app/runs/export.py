"""The figures of a run as a table, one line a step."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from typing import Any

from trainer.contract.events import EventReader
from trainer.contract.figures import figures_of
from trainer.contract.run_dir import RunDir


def figures_csv(run: RunDir) -> str:
    """Return the figures of all steps as CSV, read from the events.

    Steps that a resumed run has done again appear once, with their last figures.
    """
    return _table(EventReader(run.events).read())


def _table(events: Iterable[Mapping[str, Any]]) -> str:
    rows: dict[int, dict[str, float]] = {}
    names: dict[str, None] = {}
    for event in events:
        figures = figures_of(event)
        if not figures:
            continue
        step = event["step"]
        if event["type"] == "step":
            for later in [known for known in rows if known >= step]:
                del rows[later]
        rows.setdefault(step, {}).update(figures)
        names |= dict.fromkeys(figures)
    text = io.StringIO()
    table = csv.DictWriter(text, ["step", *names], restval="", lineterminator="\n")
    table.writeheader()
    for step in sorted(rows):
        table.writerow({"step": step, **rows[step]})
    return text.getvalue()
