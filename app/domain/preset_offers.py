"""Which presets fit a model, a goal, the data and the machine, the best first."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from app.domain.cards import Card, verdict_of_peak
from app.domain.goals import GoalChoice
from app.domain.presets import Preset, all_presets
from app.domain.weight_search import ModelFiles
from trainer.contract.dataset_config import MediaKind
from trainer.contract.memory_model import Verdict

MEDIA = {"image": "images", "video": "clips"}
_FILES_OF = {
    "high_noise": ("transformer_high_noise",),
    "both": ("transformer", "transformer_high_noise"),
    "shared": ("transformer", "transformer_high_noise"),
}
_HALVES = {"high_noise": 1, "low_noise": 2}
"""Presets of one expert come behind those of both, the high-noise one first."""
_ORDER: tuple[Verdict | None, ...] = ("fits", None, "tight", "does not fit")


@dataclass(frozen=True, slots=True)
class Offer:
    """A preset, and whether a machine has the memory."""

    preset: Preset
    verdict: Verdict | None
    """None: no GPU, or the preset does not say what it takes."""

    @property
    def card_words(self) -> str:
        """The GPUs that it is for, such as `2x24`, in GB; "": it does not say."""
        head = self.preset.head
        size = str(head.card_gb or "")
        return f"{head.num_gpus}x{size}" if size and head.num_gpus > 1 else size

    @property
    def verdict_words(self) -> str:
        """The verdict in a word."""
        return {None: "", "fits": "fits", "tight": "tight", "does not fit": "no"}[self.verdict]

    @property
    def purpose(self) -> str:
        """What it is for, in a few words."""
        preset = self.preset
        if not preset.is_shipped:
            return f"yours: {preset.title}"
        return ", ".join(part for part in (preset.head.goal, preset.medium) if part)

    @property
    def needs(self) -> str:
        """What machine it takes."""
        head, words = self.preset.head, []
        if head.card_gb:
            words.append(
                f"For {head.num_gpus} GPU{'s' * (head.num_gpus > 1)} of {head.card_gb} GB."
            )
        if head.peak_vram_gib is not None:
            each = " on each GPU" if head.num_gpus > 1 else ""
            words.append(f"About {head.peak_vram_gib:g} GiB of GPU memory{each} (estimated).")
        if head.ram_gb:
            words.append(f"At least {head.ram_gb} GB of RAM.")
        return " ".join(words)

    def matches(self, words: str) -> bool:
        """Tell whether all words are in its name, title, model or goal."""
        preset = self.preset
        text = " ".join((preset.name, preset.title, preset.variant, self.purpose, self.card_words))
        return all(word in text.lower() for word in words.lower().split())


def offer_of(preset: Preset, card: Card | None) -> Offer:
    """Return a preset with its verdict for a machine."""
    if card is None or preset.peak_vram_gib is None:
        return Offer(preset, None)
    return Offer(preset, verdict_of_peak(preset.peak_vram_gib, preset.head.num_gpus, card))


def all_offers(card: Card | None, variant: str = "") -> list[Offer]:
    """Return all presets without mistakes: those for a model first, among them the user's own."""

    def key(offer: Offer) -> tuple[bool, bool, str]:
        preset = offer.preset
        return preset.variant not in ("", variant), preset.is_shipped, preset.name

    found = [offer_of(preset, card) for preset in all_presets() if not preset.problems]
    return sorted(found, key=key)


def fitting_offers(
    model: ModelFiles,
    goal: GoalChoice,
    kind: MediaKind,
    card: Card | None,
    presets: Iterable[Preset] | None = None,
) -> list[Offer]:
    """Return the presets for a model and a goal, the best first; those that are too large last.

    Args:
        model: the preset's variant must be its, and the files of the preset's expert be there.
        goal: what is to be learned.
        kind: of the data.
        card: the GPUs; None: sizes are not judged.
        presets: out of which; None: all.
    """
    found = [
        offer_of(preset, card)
        for preset in (all_presets() if presets is None else presets)
        if not preset.problems and _serves(preset, model, goal)
    ]
    return sorted(found, key=lambda offer: _rank(offer, goal, kind))


def _serves(preset: Preset, model: ModelFiles, goal: GoalChoice) -> bool:
    if preset.variant != model.variant:
        return False
    expert = str(preset.values.get("model", {}).get("expert", ""))
    needed = _FILES_OF.get(expert, ("transformer",))
    if any(getattr(model, field) is None for field in needed):
        return False
    is_full = preset.values.get("adapter", {}).get("kind") == "none"
    if is_full != (goal.name == "full"):
        return False
    if goal.medium == "image" and preset.medium == "clips":
        return False
    if goal.medium == "video" and preset.medium == "images":
        return False
    return preset.head.goal is None or preset.head.goal in goal.presets


def _rank(
    offer: Offer, goal: GoalChoice, kind: MediaKind
) -> tuple[int, int, int, int, int, float, str]:
    preset = offer.preset
    own = preset.head.goal
    peak = preset.peak_vram_gib or 0.0
    slot = "loraid" in preset.values.get("adapter", {})  # for those who know what it is
    return (
        _ORDER.index(offer.verdict),
        goal.presets.index(own) if own in goal.presets else 0,
        int(preset.medium not in ("", MEDIA[kind])),
        int(slot),
        _HALVES.get(str(preset.values.get("model", {}).get("expert", "")), 0),
        # Where it is judged, the largest that fits; else the smallest.
        -peak * preset.head.num_gpus if offer.verdict in ("fits", "tight") else peak,
        preset.name,
    )
