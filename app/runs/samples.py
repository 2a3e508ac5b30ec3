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
_NAME = re.compile(r"step\d+_(?P<index>\d+)_(?P<seed>\d+)")
"""How the trainer names them: step, place of the prompt in the config, seed."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One video or image of a prompt at a step."""

    step: int
    path: Path
    prompt: str = ""
    """Empty: the run did not say."""
    seed: int | None = None

    @property
    def subject(self) -> str:
        """What it shows, the same at every step."""
        if self.prompt:
            seed = "" if self.seed is None else f"  (seed {self.seed})"
            return f"{self.prompt}{seed}"
        named = _NAME.match(self.path.stem)
        return f"prompt {int(named['index']) + 1}, seed {named['seed']}" if named else "sample"


def sample_of(run: RunDir, step: int, event: Mapping[str, Any]) -> Sample | None:
    """Return the sample of a `sample` event; None where it names no file.

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
    return named["index"] if named else ""
