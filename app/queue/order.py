"""The order in which people want to see jobs."""

from __future__ import annotations

from collections.abc import Sequence

from app.queue.look import JobView


def ordered(views: Sequence[JobView]) -> list[JobView]:
    """Return the jobs: live, waiting, then those that ended, the last one first."""
    live = [view for view in views if view.state.is_live]
    ended = [view for view in views if view.state.has_ended]
    rest = [view for view in views if not view.state.is_live and not view.state.has_ended]
    ended.sort(key=lambda view: view.job.outcome.time if view.job.outcome else 0.0, reverse=True)
    return [*live, *rest, *ended]
