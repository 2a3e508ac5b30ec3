"""Whole differences of parameters, which LoRA files hold beside low-rank updates.

W' = W + strength · diff: of a linear layer's weight as a branch beside it, of a bias as an addition
to the layer's output, of any other parameter (norms, modulations, the patch embedding) in its place
while its module runs. The base is never changed, so it may be quantised, or wait in RAM between
two uses, and strength 0 is the base, exactly.

Shape letters: I input width, O output width of a linear layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from trainer.adapters.adapter_linear import AdapterLinear
from trainer.adapters.base import AdapterFile, Update
from trainer.contract.errors import ModelFileError
from trainer.contract.parameter_names import linear_of, stored_name

BIAS = ".bias"


class DifferenceLinear(AdapterLinear):
    """Adds strength · diff x to the output of `base`, and nothing is trained."""

    difference: Tensor

    def __init__(self, base: nn.Module, difference_OI: Tensor) -> None:
        super().__init__(base)
        self.hold("difference", difference_OI)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., I) to (..., O); the branch computes in the dtype of x."""
        out: Tensor = self.base(x)
        if self.strength == 0.0:
            return out
        difference_OI = self.difference.to(x.dtype)
        if torch.is_grad_enabled():
            return out.add(F.linear(x, difference_OI), alpha=self.strength)
        x_NI, out_NO = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
        return out_NO.addmm_(x_NI, difference_OI.t(), alpha=self.strength).view(out.shape)


class BiasLinear(AdapterLinear):
    """Adds strength · diff to the bias of `base`, and nothing is trained."""

    difference: Tensor

    def __init__(self, base: nn.Module, difference_O: Tensor) -> None:
        super().__init__(base)
        self.hold("difference", difference_O)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., I) to (..., O)."""
        out: Tensor = self.base(x)
        if self.strength == 0.0:
            return out
        difference_O = self.difference.to(out.dtype)
        if torch.is_grad_enabled():
            return out.add(difference_O, alpha=self.strength)
        return out.add_(difference_O, alpha=self.strength)  # as large as all tokens


@dataclass(frozen=True, slots=True, eq=False)
class WeightDifference(Update):
    """The whole difference of one linear layer's weight, (O, I)."""

    kind = "difference"
    keeps_dtype = True

    difference_OI: Tensor
    alpha: float = 1.0

    @property
    def rank(self) -> int:
        """The most that a matrix of this shape can have."""
        return min(self.difference_OI.shape)

    @property
    def scale(self) -> float:
        """1: a file gives a difference no alpha."""
        return 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I): shape of the weight that is changed."""
        outputs, inputs = self.difference_OI.shape
        return outputs, inputs

    def tensors(self) -> dict[str, Tensor]:
        """Return `diff` (O, I)."""
        return {"diff": self.difference_OI}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> WeightDifference:
        """Return the same update of this difference."""
        return replace(self, difference_OI=tensors["diff"])

    def delta(self, strength: float = 1.0) -> Tensor:
        """Return strength · diff."""
        return self.difference_OI.to(torch.float32, copy=True).mul_(strength)

    def beside(self, base: nn.Module, dtype: torch.dtype, device: torch.device) -> DifferenceLinear:
        """Return a branch with the whole matrix beside `base`."""
        return DifferenceLinear(base, self.difference_OI.to(device, dtype))

    def folded(self) -> WeightDifference:
        """Return the same: there is no scale."""
        return self


@dataclass(frozen=True, slots=True, eq=False)
class ParameterDifference:
    """The whole difference of a parameter that is no weight of a linear layer."""

    difference: Tensor

    def added_to(self, parameter: Tensor, strength: float = 1.0) -> Tensor:
        """Return parameter + strength · diff in float32; the parameter is unchanged."""
        own = self.difference.to(parameter.device, torch.float32)
        return parameter.float() + strength * own


class ShownSum:
    """Shows a module its parameters with differences added, while it runs.

    The sums are attributes of the module, which are found before its parameters; whatever moves,
    streams, shards or saves the parameters finds them as they are.

    Attributes:
        strength: multiplies the differences; 0 gives the base's own output, exactly.
    """

    def __init__(self, module: nn.Module, differences: Mapping[str, Tensor]) -> None:
        """Put it on `module`.

        Args:
            module: owns the parameters.
            differences: by the names of the parameters in the module.
        """
        self.strength = 1.0
        self._module = module
        self._differences = {name: ParameterDifference(d) for name, d in differences.items()}
        self._covered: dict[str, Tensor | None] = {}
        self._shown: dict[str, Tensor] = {}
        self._handles: tuple[RemovableHandle, ...] = (
            module.register_forward_pre_hook(self._show),
            # Others that came before this one show theirs below it, and take them away later.
            module.register_forward_hook(self._hide, prepend=True, always_call=True),
        )

    def remove(self) -> None:
        """Take it off the module."""
        self._uncover()
        for handle in self._handles:
            handle.remove()
        self._handles = ()

    def _show(self, module: nn.Module, _args: Any) -> None:
        self._uncover()  # a signal in the midst of a forward skips `_hide`
        if self.strength == 0.0:
            return
        for name, difference in self._differences.items():
            parameter: Tensor = getattr(module, name)
            self._covered[name] = module.__dict__.get(name)
            total = difference.added_to(parameter, self.strength)
            module.__dict__[name] = self._shown[name] = total.to(parameter.dtype)

    def _hide(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        self._uncover()

    def _uncover(self) -> None:
        seen = self._module.__dict__
        for name, covered in self._covered.items():
            if covered is None:
                seen.pop(name, None)
            elif seen.get(name) is self._shown.get(name):
                seen[name] = covered
        self._covered, self._shown = {}, {}


def parameter_shapes(model: nn.Module, parameters: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of those of these parameters that a model has."""
    found: dict[str, tuple[int, ...]] = {}
    for name in parameters:
        try:
            found[name] = tuple(parameter_of(model, name).shape)
        except LookupError:
            continue
    return found


def parameter_of(model: nn.Module, name: str) -> Tensor:
    """Return a parameter under all adapters, or what stands for it where blocks are streamed.

    Raises:
        LookupError: the model has none of this name.
    """
    module, _, leaf = name.rpartition(".")
    try:
        owner = model.get_submodule(module)
        while isinstance(owner, AdapterLinear):
            owner = owner.base
        tensor = getattr(owner, leaf)
    except AttributeError:
        tensor = None
    if isinstance(tensor, Tensor):
        return tensor
    raise LookupError(f"the model has no {name}")


def fitting_differences(
    shapes: Mapping[str, tuple[int, ...]], adapter: AdapterFile, *, skip_missing: bool = False
) -> dict[str, Tensor]:
    """Return the differences of `adapter` for a model with parameters of these shapes.

    Raises:
        ModelFileError: a parameter is missing or has another shape; names file and parameter.
    """
    found: dict[str, Tensor] = {}
    for parameter, difference in adapter.differences.items():
        key = stored_name(parameter)
        if parameter not in shapes:
            if skip_missing:
                continue
            raise ModelFileError(
                f"{adapter.path} is for another model: {key} changes {parameter}, which this one "
                "does not have",
                hint="use the LoRA with the model it was trained for",
            )
        if tuple(difference.shape) != tuple(shapes[parameter]):
            raise ModelFileError(
                f"{adapter.path} is for another model: {key} is {tuple(difference.shape)}, and "
                f"{parameter} is {tuple(shapes[parameter])} in this one",
                hint="use the LoRA with the model it was trained for",
            )
        found[parameter] = difference
    return found


def shown_in_blocks(adapter: AdapterFile) -> str | None:
    """Return a difference that a block is shown while it runs, which compiled code does not take.

    None where there is none: biases and weights of linear layers are layers of their own.
    """
    for module, own in on_modules(adapter.differences, biases=False).items():
        if module.startswith("blocks."):
            return stored_name(f"{module}.{next(iter(own))}")
    return None


def on_modules(differences: Mapping[str, Tensor], *, biases: bool) -> dict[str, dict[str, Tensor]]:
    """Return differences by module and parameter: the biases of linear layers, or all others.

    Those that are zero throughout are left out: they change nothing.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for parameter, difference in differences.items():
        is_bias = parameter.endswith(BIAS) and linear_of(parameter) is not None
        if is_bias == biases and bool(difference.float().any()):
            module, _, name = parameter.rpartition(".")
            found.setdefault(module, {})[name] = difference
    return found
