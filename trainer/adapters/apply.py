"""Using a LoRA file: beside a model's layers for a while, or merged into its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from trainer.adapters.adapter_linear import AdapterLinear
from trainer.adapters.base import AdapterFile, Update
from trainer.adapters.difference import (
    BiasLinear,
    ParameterDifference,
    ShownSum,
    fitting_differences,
    on_modules,
    parameter_of,
    parameter_shapes,
)
from trainer.adapters.rank_mask import RankMask, RankSchedule, masked_beside
from trainer.adapters.targets import linear_layers
from trainer.adapters.wrapping import readable, unwrap, wrap
from trainer.contract.errors import ModelFileError
from trainer.contract.layer_names import block_index

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Attachment:
    """A LoRA that is on a model until `detach`."""

    def __init__(
        self,
        transformer: nn.Module,
        layers: Sequence[tuple[str, AdapterLinear]],
        following: RemovableHandle | None = None,
        shown: Sequence[ShownSum] = (),
    ) -> None:
        self._transformer = transformer
        self._layers = list(layers)
        self._following = following
        self._shown = list(shown)

    def set_strength(self, strength: float) -> None:
        """Multiply the update by `strength`; 0 gives the base model, exactly."""
        for _, layer in self._layers:
            layer.strength = strength
        for shown in self._shown:
            shown.strength = strength

    def detach(self) -> None:
        """Take the LoRA off again; the model is as it was. A second call does nothing."""
        for name, layer in reversed(self._layers):
            unwrap(self._transformer, name, layer)
        for shown in self._shown:
            shown.remove()
        self._layers, self._shown = [], []
        if self._following is not None:
            self._following.remove()


def attach(
    transformer: nn.Module,
    adapter: AdapterFile,
    strength: float = 1.0,
    *,
    skip_missing: bool = False,
) -> Attachment:
    """Put a LoRA beside the layers of `transformer`; several may be attached at once.

    The factors are not trained and do not appear in the state dict. They are copied to the device
    of the model and the dtype of the layer's weight (bf16 where that is quantised). A T-LoRA acts
    with the ranks that each forward's timesteps give it, as in its training.

    Args:
        transformer: model with canonical module names.
        adapter: what `load_adapter` returned.
        strength: multiplies the update.
        skip_missing: leave out modules that the model does not have (an image-to-video LoRA on a
            text-to-video model) instead of refusing them.

    Raises:
        ModelFileError: the LoRA is for another model; nothing was changed.
    """
    linears = linear_layers(transformer)
    fitting = fitting_modules(_shapes(linears), adapter, skip_missing=skip_missing)
    shapes = parameter_shapes(transformer, list(adapter.differences))
    differences = fitting_differences(shapes, adapter, skip_missing=skip_missing)
    layers: dict[str, AdapterLinear] = {}
    # Not the layer's own: a streamed layer's weight is on no device between two uses.
    device = next(transformer.parameters()).device
    differences = {name: difference.to(device) for name, difference in differences.items()}
    schedule = RankSchedule.of_file(adapter.metadata, adapter.path)
    mask = None if schedule is None else RankMask(schedule)
    for name, update in fitting.items():
        base = linears[name]
        weight = _weight(base)
        dtype = weight.dtype if weight.dtype in _FLOATS else torch.bfloat16
        if mask is None:
            layer = update.beside(base, dtype, device)
        else:
            layer = masked_beside(mask, update, base, dtype, device)
        layers[name] = layer
    worn: list[tuple[str, AdapterLinear]] = list(layers.items())
    for name, own in on_modules(differences, biases=True).items():
        under = layers.get(name, linears[name])
        worn.append((name, BiasLinear(under, own["bias"])))
    for name, layer in worn:
        layer.train(transformer.training)
        wrap(transformer, name, layer)
    attachment = Attachment(
        transformer,
        worn,
        None if mask is None else mask.follow(transformer),
        [
            ShownSum(transformer.get_submodule(name), own)
            for name, own in on_modules(differences, biases=False).items()
        ],
    )
    attachment.set_strength(strength)
    return attachment


OnMerged = Callable[[str, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Told of (layer, weight as it is kept, exact sum, weight before), all but the first float32."""


_Share = tuple[Update | ParameterDifference, float]
"""What is added to a weight, and its strength."""


def merge_into(
    transformer: nn.Module,
    adapter: AdapterFile,
    strength: float = 1.0,
    *,
    skip_missing: bool = False,
) -> None:
    """Add a LoRA to the weights of `transformer`: summed in float32, kept in the weights' dtype.

    Raises:
        ModelFileError: the LoRA is for another model, or the weights are quantised; nothing was
            changed.
    """
    merge_several(transformer, [(adapter, strength)], skip_missing=skip_missing)


def merge_several(
    transformer: nn.Module,
    parts: Sequence[tuple[AdapterFile, float]],
    *,
    skip_missing: bool = False,
    on_merged: OnMerged | None = None,
) -> None:
    """Add LoRAs with their strengths to the weights; each weight is rounded once, at the end.

    Weights that wait in RAM (block swap) are changed there.

    Raises:
        ModelFileError: a LoRA is for another model, or the weights are quantised; nothing was
            changed.
    """
    linears = linear_layers(transformer)
    shares: dict[str, list[_Share]] = {}
    vectors: dict[str, list[_Share]] = {}
    for adapter, strength in parts:
        fitting = fitting_modules(_shapes(linears), adapter, skip_missing=skip_missing)
        quantised = [name for name in fitting if _weight(linears[name]).dtype not in _FLOATS]
        if quantised:
            raise ModelFileError(
                f"{adapter.path} cannot be merged: {quantised[0]} and {len(quantised) - 1} more "
                "layers are quantised, and rounding would swallow the LoRA",
                hint="attach it instead, or load the model in bf16",
            )
        for name, update in fitting.items():
            shares.setdefault(name, []).append((update, strength))
        own_shapes = parameter_shapes(transformer, list(adapter.differences))
        differences = fitting_differences(own_shapes, adapter, skip_missing=skip_missing)
        for name, difference in differences.items():
            vectors.setdefault(name, []).append((ParameterDifference(difference), strength))
    with torch.no_grad():
        for name, own in shares.items():
            with readable(transformer, name):
                _merge_layer(name, _weight(linears[name]), own, on_merged)
        for name, own in vectors.items():
            with readable(transformer, name):
                _merge_layer(name, parameter_of(transformer, name), own, on_merged)


def _merge_layer(
    name: str,
    weight: torch.Tensor,
    shares: Sequence[_Share],
    on_merged: OnMerged | None,
) -> None:
    base = exact = weight.float()
    for update, strength in shares:
        # The factors are small and the sum is not: it is formed where the weight is.
        near = update
        if isinstance(near, Update):
            moved = {role: part.to(weight.device) for role, part in near.tensors().items()}
            near = near.with_tensors(moved)
        exact = near.added_to(exact, strength)
    if on_merged is None:
        weight.copy_(exact)
        return
    base = base.clone() if base is weight else base
    weight.copy_(exact)
    on_merged(name, weight.float(), exact, base)


def fitting_modules(
    shapes: Mapping[str, tuple[int, int]], adapter: AdapterFile, *, skip_missing: bool = False
) -> dict[str, Update]:
    """Return the modules of `adapter` for a model with layers of these (O, I) shapes.

    Raises:
        ModelFileError: modules are missing or have another shape; names what the LoRA is for.
    """
    if not adapter and adapter.differences:
        return {}
    missing = [name for name in adapter if name not in shapes]
    fitting = {name: update for name, update in adapter.items() if name in shapes}
    wrong = [name for name, update in fitting.items() if update.shape != shapes[name]]
    if wrong:
        name = wrong[0]
        raise ModelFileError(
            f"{adapter.path} is for another model: {name} is {fitting[name].shape} in the LoRA "
            f"and {shapes[name]} in the model ({len(wrong)} of {len(fitting)} layers differ). "
            f"{_compare(shapes, adapter)}",
            hint="use the LoRA with the model it was trained for",
        )
    if not fitting or (missing and not skip_missing):
        listed = ", ".join(missing[:4]) + (", …" if len(missing) > 4 else "")
        raise ModelFileError(
            f"{adapter.path} is for another model: {len(missing)} of its {len(adapter)} layers are "
            f"not in this one ({listed}). {_compare(shapes, adapter)}",
            hint="use the LoRA with the model it was trained for",
        )
    return fitting


def describe(shapes: Mapping[str, tuple[int, int]]) -> str:
    """Say in words what model has linear layers of these (O, I) shapes."""
    widths = sorted({shape[1] for name, shape in shapes.items() if name.endswith("attn.q")})
    feed_forward = sorted({shape[0] for name, shape in shapes.items() if name.endswith("ffn.0")})
    parts = [f"width {_either(widths)}" if widths else "", _block_text(shapes)]
    parts.append(f"feed-forward {_either(feed_forward)}" if feed_forward else "")
    if any(name.endswith(("k_img", "v_img")) for name in shapes):
        parts.append("with image branch")
    return ", ".join(part for part in parts if part)


def _compare(shapes: Mapping[str, tuple[int, int]], adapter: AdapterFile) -> str:
    own = {name: update.shape for name, update in adapter.items()}
    return f"The LoRA: {describe(own)}; the model: {describe(shapes)}"


def _block_text(names: Iterable[str]) -> str:
    indexes = sorted({index for name in names if (index := block_index(name)) is not None})
    if not indexes:
        return "no blocks"
    return f"blocks {indexes[0]}-{indexes[-1]}" if len(indexes) > 1 else f"block {indexes[0]}"


def _either(sizes: list[int]) -> str:
    return " or ".join(str(size) for size in sizes)


def _shapes(linears: Mapping[str, nn.Module]) -> dict[str, tuple[int, int]]:
    return {
        name: (int(m.out_features), int(m.in_features))  # type: ignore[arg-type]
        for name, m in linears.items()
    }


def _weight(layer: nn.Module) -> torch.Tensor:
    weight = layer.weight
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"{type(layer).__name__} has no weight tensor")
    return weight
