"""The LoRAs of a sampling run: on its transformers, as strongly as each sample and step wants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from trainer.adapters import load_adapter
from trainer.adapters.apply import Attachment, attach, merge_several
from trainer.adapters.base import AdapterFile
from trainer.contract.lora_use import LoRAUse
from trainer.contract.variants import Expert
from trainer.jobs.lora_files import experts_of
from trainer.jobs.merge_weights import Rounding
from trainer.sampling.requests import SampleRequest

OnMerge = Callable[[Expert, Rounding], None]


class LoRASwitch:
    """Puts LoRAs beside a transformer's layers, sets their strengths, and takes them off again.

    Or adds them to its weights, for good.

    The base is loaded once, whatever LoRAs and strengths follow each other. A LoRA that a sample
    does not use is not on the transformer and takes neither time nor device memory.
    """

    def __init__(
        self,
        uses: Sequence[LoRAUse],
        *,
        has_experts: bool,
        merges: bool = False,
        on_merge: OnMerge = lambda _expert, _rounding: None,
    ) -> None:
        """Prepare; no file is read yet.

        Args:
            uses: the run's LoRAs, in the order of `SampleRequest.lora_strengths`.
            has_experts: the model has two transformers; a LoRA may be for one of them.
            merges: add them to the weights instead, once, with the strengths of the first step;
                `check_merge` has seen that they never change.
            on_merge: told of what rounding the sums has cost.
        """
        self._uses = tuple(uses)
        self._has_experts = has_experts
        self._files: dict[Expert, dict[int, AdapterFile]] = {}
        self._worn: dict[Expert, dict[int, Attachment]] = {}
        self._current = self._uses
        self._share = 0.0
        self._merges = merges
        self._on_merge = on_merge
        self._merged: set[Expert] = set()

    def begin(self, request: SampleRequest) -> None:
        """Turn to the next sample."""
        self._current = uses_in(request, self._uses)
        self._share = 0.0

    def on_step(self, done: int, steps: int) -> None:
        """Turn to the next step: `done` of `steps` are made."""
        self._share = min(1.0, done / max(1, steps - 1))

    def ready(self, transformer: nn.Module, expert: Expert) -> nn.Module:
        """Return `transformer`, of `expert` and on its device, with the LoRAs of this step.

        Raises:
            ModelFileError: a LoRA is for another model, or cannot be read.
        """
        high = self._has_experts and expert == "high_noise"
        files = self._files_of(expert)
        acting = [index for index in files if self._current[index].acts(high_noise=high)]
        if self._merges:
            if expert not in self._merged:
                strengths = self._strengths(acting, high_noise=high)
                self._merge(transformer, expert, [(files[i], strengths[i]) for i in acting])
            return transformer
        worn = self._worn.setdefault(expert, {})
        if list(worn) != acting:
            for attachment in reversed(worn.values()):
                attachment.detach()
            worn.clear()
            # In the order they are given: a DoRA measures the weights with what is under it.
            worn.update((index, attach(transformer, files[index])) for index in acting)
        for index, strength in self._strengths(acting, high_noise=high).items():
            worn[index].set_strength(strength)
        return transformer

    def _strengths(self, acting: Sequence[int], *, high_noise: bool) -> dict[int, float]:
        uses = {index: self._current[index] for index in acting}
        return {
            index: use.strength_at(high_noise=high_noise, share=self._share)
            for index, use in uses.items()
        }

    def _merge(
        self, transformer: nn.Module, expert: Expert, parts: Sequence[tuple[AdapterFile, float]]
    ) -> None:
        rounding = Rounding()
        merge_several(transformer, parts, on_merged=rounding.add)
        self._merged.add(expert)
        if parts:
            self._on_merge(expert, rounding)

    def _files_of(self, expert: Expert) -> dict[int, AdapterFile]:
        if expert not in self._files:
            self._files[expert] = open_for(self._uses, expert if self._has_experts else None)
        return self._files[expert]


def uses_in(request: SampleRequest, uses: Sequence[LoRAUse]) -> tuple[LoRAUse, ...]:
    """Return how a sample uses the run's LoRAs: at their own strengths, or at the request's.

    Raises:
        ValueError: the request has strengths of another number of LoRAs.
    """
    if request.lora_strengths is None:
        return tuple(uses)
    return tuple(
        use.with_strength(strength)
        for use, strength in zip(uses, request.lora_strengths, strict=True)
    )


def open_for(uses: Sequence[LoRAUse], expert: Expert | None) -> dict[int, AdapterFile]:
    """Return the files that are for `expert` by their place; None: the model has one transformer.

    Which expert a LoRA is for is said by its `expert`, else by the file's metadata, else by the
    words `high` or `low` in its name; one that says nothing is for both.

    Raises:
        ModelFileError: a file cannot be read.
    """
    adapters = [
        load_adapter(use.path, expert=expert or use.expert, differences=True) for use in uses
    ]
    return {
        index: adapter
        for index, (use, adapter) in enumerate(zip(uses, adapters, strict=True))
        if expert is None or expert in experts_of(use, adapter.metadata)
    }


def attach_loras(transformer: nn.Module, loras: Sequence[LoRAUse], expert: Expert | None) -> None:
    """Attach the LoRAs that are for `expert`, for good; None: of a model with one transformer.

    Raises:
        ModelFileError: a LoRA is for another model.
    """
    for index, adapter in open_for(loras, expert).items():
        attach(transformer, adapter, loras[index].strength)


def described(use: LoRAUse) -> dict[str, Any]:
    """Return what a sample's metadata say of a LoRA: its file, and what it is used with."""
    own = use.model_dump(mode="json", exclude_defaults=True, exclude={"path", "strength"})
    return {"file": use.path.name, "strength": use.strength, **own}
