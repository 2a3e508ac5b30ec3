"""One-frame mode: one picture at a chosen moment of a clip, given pictures of other moments."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.contract.errors import ConfigError, Problem

MAX_INDEX = 1023
"""The last latent frame that Wan has positions for."""
_FORM = "as in target_index=1,control_index=0;2"


@dataclass(frozen=True, slots=True)
class OneFrame:
    """Which latent frames there are, as positions in a clip."""

    target_index: int
    control_indices: tuple[int, ...]
    """Of the pictures that are given, in their order."""

    @classmethod
    def parse(cls, text: str) -> OneFrame:
        """Read musubi-tuner's form, `target_index=1,control_index=0;2`.

        Raises:
            ConfigError: another form, an index outside 0 to 1023, or one that is there twice.
        """
        values: dict[str, tuple[int, ...]] = {}
        for part in text.split(","):
            name, _, numbers = part.strip().partition("=")
            try:
                found = tuple(int(number) for number in numbers.split(";"))
            except ValueError:
                raise _wrong(f"{part.strip()!r} has no whole numbers") from None
            if name not in {"target_index", "control_index"} or name in values:
                raise _wrong(f"{name!r} is unknown or there twice")
            values[name] = found
        target, controls = values.get("target_index", ()), values.get("control_index", ())
        if len(target) != 1 or not controls:
            raise _wrong("one target_index and at least one control_index are needed")
        indices = (*target, *controls)
        if len(set(indices)) < len(indices) or not all(0 <= i <= MAX_INDEX for i in indices):
            raise _wrong(f"indices must differ and be from 0 to {MAX_INDEX}")
        return cls(target[0], controls)

    @property
    def positions(self) -> tuple[int, ...]:
        """All latent frames, in order of time."""
        return tuple(sorted((self.target_index, *self.control_indices)))

    @property
    def target(self) -> int:
        """Place of the target among `positions`."""
        return self.positions.index(self.target_index)


def _wrong(message: str) -> ConfigError:
    return ConfigError(problems=[Problem(message, key="one_frame", hint=_FORM)])
