"""The samples that a run has made, by prompt and step."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.runs.printable import printable
from trainer.contract.run_dir import RunDir

MAX_WORDS = 4_000
_NAME = re.compile(r"step\d+_(?P<index>\d+)_(?P<seed>\d+)|preview_(?P<work>\d+)")
"""How the trainer names them: step, place of the prompt in the config, seed; while they are made
the place alone."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One video or image of a prompt at a step."""

    step: int
    path: Path
    prompt: str = ""
    """Empty: the run did not say."""
    seed: int | None = None
    work: str = ""
    """How far it is: a rough picture of a sample that is being made; empty: it is made."""

    @property
    def subject(self) -> str:
        """What it shows, the same at every step."""
        if self.prompt:
            seed = "" if self.seed is None else f"  (seed {self.seed})"
            return f"{self.prompt}{seed}"
        named = _NAME.match(self.path.stem)
        if not named or not named["seed"]:
            return "sample"
        return f"prompt {int(named['index']) + 1}, seed {named['seed']}"


def sample_of(run: RunDir, step: int, event: Mapping[str, Any]) -> Sample | None:
    """Return the sample of a `sample` or a `preview` event; None where it names no file.

    A run directory may have been moved since: the file in its `samples` folder comes first.
    """
    told = event.get("path")
    if not isinstance(told, str) or not told:
        return None
    moved = run.samples / Path(told).name
    prompt, seed = event.get("prompt"), event.get("seed")
    return Sample(
        step=step,
        path=moved if moved.exists() else Path(told),
        prompt=" ".join(printable(prompt[:MAX_WORDS]).split()) if isinstance(prompt, str) else "",
        seed=seed if isinstance(seed, int) else None,
        work=_work(event) if event.get("type") == "preview" else "",
    )


def by_subject(samples: Iterable[Sample]) -> dict[str, list[Sample]]:
    """Return the samples of each prompt by step; of a step done again, the last one."""
    found: dict[str, dict[int, Sample]] = {}
    for sample in samples:
        found.setdefault(sample.subject, {})[sample.step] = sample
    return {
        subject: [steps[step] for step in sorted(steps)]
        for subject, steps in sorted(found.items(), key=lambda item: _first_name(item[1]))
    }


def _first_name(steps: Mapping[int, Sample]) -> str:
    """Return what orders the subjects: the place of the prompt is in the files' names."""
    named = _NAME.match(steps[min(steps)].path.stem)
    return (named["index"] or named["work"]) if named else ""


def _work(event: Mapping[str, Any]) -> str:
    done, total = event.get("done"), event.get("total")
    known = isinstance(done, int) and isinstance(total, int)
    return f"being made, {done} of {total}" if known else "being made"
