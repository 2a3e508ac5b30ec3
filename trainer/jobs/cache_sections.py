"""The sources of a cache job, and what the index says of them before and after.

A section is marked unfinished just before its first entry is written: what fails earlier (a weight
file that is no encoder, a window that does not fit the GPU) leaves a good cache as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from trainer.contract.errors import Problem
from trainer.data.cache_index import (
    IndexedItem,
    Section,
    Unneeded,
    read_index,
    section_name,
    unneeded_entries,
    write_index,
)
from trainer.data.cache_settings import CacheSettings
from trainer.data.plan import SourcePlan
from trainer.data.text_cache import text_key


@dataclass(slots=True)
class Work:
    """One source while it is being cached."""

    folder: Path
    plan: SourcePlan
    settings: CacheSettings
    problems: list[Problem]
    failed: set[str]
    """Entry files that could not be made; sources of one cache folder share this set."""
    notes: list[str] = field(default_factory=list)
    failed_captions: set[str] = field(default_factory=set)
    marked: bool = False
    """The index says that this source is not finished."""

    @property
    def section_name(self) -> str:
        """Its section in the index."""
        return section_name(self.plan.source, self.settings)


def mark_unfinished(works: Iterable[Work], captions: Sequence[str]) -> None:
    """Write down that entries of these sources are about to change; once for each source."""
    unmarked = [work for work in works if not work.marked]
    for folder in dict.fromkeys(work.folder for work in unmarked):
        _write_sections(folder, unmarked, captions, finished=False)
    for work in unmarked:
        work.marked = True


def write_finished(works: Sequence[Work], captions: Sequence[str], *, prune: bool) -> Unneeded:
    """Write that all is there; return what the cache folders hold besides.

    Args:
        works: all sources of the job.
        captions: encoded for every source, though no item has them.
        prune: forget what other configs cached, and remove every entry that is not needed here.
    """
    unneeded = Unneeded()
    for folder in dict.fromkeys(work.folder for work in works):
        mine = _write_sections(folder, works, captions, finished=True, alone=prune)
        unneeded += unneeded_entries(folder, mine, remove=prune)
    return unneeded


def _write_sections(
    folder: Path,
    works: Iterable[Work],
    captions: Sequence[str],
    *,
    finished: bool,
    alone: bool = False,
) -> list[Section]:
    """Write the index of a folder and return the sections of these sources."""
    mine: dict[str, Section] = {}
    others = {} if alone else read_index(folder)
    for work in works:
        # Two sources that are alike share a section; problems are noted at the first.
        name = work.section_name
        if work.folder == folder and name not in mine:
            section = _section(work, captions, finished)
            if name in others:  # another config may need other texts of the same clips
                kept = {**others[name].extra_captions, **section.extra_captions}
                section = replace(section, extra_captions=kept)
            mine[name] = section
    write_index(folder, {**{n: s for n, s in others.items() if n not in mine}, **mine})
    return list(mine.values())


def _section(work: Work, captions: Sequence[str], finished: bool) -> Section:
    items = {}
    skipped = dict(work.plan.skipped)
    for planned in work.plan.items:
        if not work.failed_captions.isdisjoint(planned.item.captions):
            skipped[planned.item.name] = planned.identity.stat
            continue
        entries = tuple(entry for entry in planned.entries if entry.file not in work.failed)
        items[planned.item.name] = IndexedItem(
            planned.identity,
            text_key(planned.item.caption, work.settings),
            entries,
            whole=len(entries) == len(planned.entries),
            more_caption_keys=tuple(
                text_key(text, work.settings) for text in planned.item.more_captions
            ),
            paired=planned.paired,
        )
    return Section(
        work.settings.for_source(work.plan.source),
        items,
        tuple(work.problems),
        skipped=skipped,
        extra_captions={caption: text_key(caption, work.settings) for caption in captions},
        finished=finished,
    )
