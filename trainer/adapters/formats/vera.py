"""What the modules of a VeRA file share: two random matrices, stored or drawn again.

ΔW = diag(b) B diag(d) A with A and B of the widest layer, of which each layer takes the first
columns and rows. VeRA, Kopiczko et al., arXiv:2310.11454; the shapes, and how they are drawn from a
seed, as in PEFT 0.21 (`VeraModel`).

Shape letters: R rank, I input width, O output width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_SQUARE = re.compile(r".*_attn\.(?:[qkvo]|[kv]_img)")


@dataclass(frozen=True, slots=True, kw_only=True)
class VeraProjections:
    """Finds the part of the shared matrices that is a module's.

    Attributes:
        stored: `vera_A` (R, I) and `vera_B` (O, R), if the file has them.
        settings: PEFT's, where there are any.
        outputs: O of every VeRA module of the file, by canonical name.
    """

    stored: Mapping[str, Tensor]
    settings: Mapping[str, Any]
    outputs: Mapping[str, int]

    def slices(self, module: str, outputs: int) -> tuple[Tensor, Tensor] | str:
        """Return the module's A (R, I) and B (O, R), or what is missing for that."""
        inputs = self._inputs(module)
        if inputs is None:
            return "the file does not tell the input width that VeRA's shared matrix is cut to"
        found = (self.stored["vera_A"], self.stored["vera_B"]) if self.stored else self._drawn()
        if isinstance(found, str):
            return found
        a_RI, b_OR = found
        if a_RI.shape[1] < inputs or len(b_OR) < outputs or len(a_RI) != b_OR.shape[1]:
            return (
                f"vera_A {tuple(a_RI.shape)} and vera_B {tuple(b_OR.shape)} do not fit a layer of "
                f"{inputs} inputs and {outputs} outputs"
            )
        return a_RI[:, :inputs], b_OR[:outputs]

    def notes(self) -> tuple[str, ...]:
        """Say that modules were VeRA, and where their shared matrices come from."""
        if not self.outputs:
            return ()
        origin = "stored in the file" if self.stored else "drawn from projection_prng_key"
        told = f"{len(self.outputs)} modules are VeRA with matrices {origin}: read as LoRA"
        return (told,)

    def _drawn(self) -> tuple[Tensor, Tensor] | str:
        rank, seed = (self.settings.get(key) for key in ("r", "projection_prng_key"))
        if not isinstance(rank, int) or not isinstance(seed, int) or not 0 < rank < 2**16:
            return (
                "the file holds neither vera_A and vera_B nor r and projection_prng_key beside it "
                "(adapter_config.json) to draw them from"
            )
        widths = [self._inputs(module) for module in self.outputs]
        known = [width for width in widths if width is not None]
        if len(known) < len(widths):
            return "the width of VeRA's shared matrices cannot be told from the file"
        random = torch.Generator().manual_seed(seed)
        return (
            _kaiming(rank, max(known), random),
            _kaiming(max(self.outputs.values()), rank, random),
        )

    def _inputs(self, module: str) -> int | None:
        """Return a module's input width: files hold output widths only."""
        inner = module.split(".", 2)[-1]
        if _SQUARE.fullmatch(inner):
            return self.outputs[module]
        # Of a feed-forward, one layer's inputs are the other's outputs; the model's width is also
        # the output of every attention layer.
        others = {"ffn.0": r"ffn\.2|" + _SQUARE.pattern, "ffn.2": r"ffn\.0"}
        if inner not in others:
            return None
        same = re.compile(others[inner])
        found = (o for n, o in self.outputs.items() if same.fullmatch(n.split(".", 2)[-1]))
        return next(found, self._widest())

    def _widest(self) -> int | None:
        return self.stored["vera_A"].shape[1] if self.stored else None


def _kaiming(rows: int, columns: int, random: torch.Generator) -> Tensor:
    """Kaiming-uniform with gain √2: within ±√3 · √2 / √columns."""
    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(columns))
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=random)
