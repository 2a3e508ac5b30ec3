"""One process, plain torch: the engine where DeepSpeed is not, and the reference in tests."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trainer.core.seams import OptimizerFactory
from trainer.core.types import Batch
from trainer.engine.finite import gradient_error
from trainer.engine.process_group import World
from trainer.engine.running_average import AverageSettings
from trainer.engine.state_files import EngineState, Piece
from trainer.engine.stepping import SteppingEngine, fill_missing_gradients, parameter_groups


class LocalEngine(SteppingEngine):
    """`core.seams.Engine` for one process.

    Parameters in bf16 or fp16 are trained through float32 master copies, and the gradients of
    their microbatches are added up in float32, unless the optimizer updates them as they are.

    Args:
        module: the whole step; maps a `Batch` to loss terms, each of shape ().
        trainable: the trained parameters by canonical name.
        optimizer_factory: makes the optimizer.
        device: where the module goes.
        max_grad_norm: gradients are scaled down to this norm; 0 leaves them.
        gradient_accumulation_steps: microbatches per update.
        lr_scales: factor of the learning rate by canonical name, 1 where absent.
        max_grad_value: each element of the gradients is cut to this size after that; 0 leaves them.
        average: how the weights are averaged; None: they are not.
    """

    def __init__(  # noqa: PLR0913 - keywords, each with a value of its own
        self,
        module: nn.Module,
        trainable: Mapping[str, nn.Parameter],
        optimizer_factory: OptimizerFactory,
        *,
        device: torch.device | str,
        max_grad_norm: float,
        gradient_accumulation_steps: int,
        lr_scales: Mapping[str, float] | None = None,
        max_grad_value: float = 0.0,
        average: AverageSettings | None = None,
    ) -> None:
        super().__init__(module, trainable, World.alone(device), gradient_accumulation_steps)
        self._module = module.to(self.device)
        self._max_grad_norm = max_grad_norm
        self._state_names = optimizer_factory.state_names
        as_it_is = optimizer_factory.keeps_low_precision
        self._updated = {
            name: value if as_it_is else _float32(value) for name, value in self._trainable.items()
        }
        groups = parameter_groups(self._updated, lr_scales or {})
        optimizer = optimizer_factory.build(groups, lr=0.0)
        self._adopt(optimizer, max_grad_value=max_grad_value, average=average)

    def full_parameters(self) -> dict[str, Tensor]:
        """Return the trained parameters, float32 on the CPU, by canonical name."""
        return {
            name: parameter.detach().to("cpu", torch.float32, copy=True)
            for name, parameter in self._updated.items()
        }

    def close(self) -> None:
        """Free gradients and optimizer state; the module stays usable."""
        for parameter in (*self._trainable.values(), *self._updated.values()):
            parameter.grad = None
        self._optimizer.state.clear()

    def _forward(self, batch: Batch) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = self._module(batch)
        return terms

    def _backward(self, loss: Tensor, *, last: bool) -> None:
        (loss / self._accumulation).backward()  # type: ignore[no-untyped-call]  # torch's own gap
        for name, parameter in self._trainable.items():
            if self._updated[name] is not parameter and parameter.grad is not None:
                _add_gradient(self._updated[name], parameter.grad.float())
                parameter.grad = None

    def _after_backward(self) -> None:
        fill_missing_gradients(self._updated.values())

    def _param_groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups

    def _step(self) -> float:
        try:
            norm = clip_gradients(list(self._updated.values()), self._max_grad_norm)
            self._optimizer.step()
        finally:
            for parameter in self._updated.values():
                parameter.grad = None
        self._refresh_weights()
        return norm

    def _state(self) -> EngineState:
        names = list(self._updated)
        return EngineState(
            engine="local",
            world_size=1,
            zero_stage=0,
            rank=0,
            shapes={name: tuple(self._updated[name].shape) for name in names},
            flats=list(self._updated.values()),
            pieces=whole_pieces(self._updated),
            own=True,
            optimizer=self._optimizer,
            state_names=self._state_names,
            inner_step=self._optimizer.step,
            counters=self._counters,
            average=self._average,
        )

    @torch.no_grad()
    def _refresh_weights(self) -> None:
        for name, parameter in self._trainable.items():
            if self._updated[name] is not parameter:
                parameter.copy_(self._updated[name])


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> float:
    """Scale the gradients down to `max_norm` (0: leave them); return their L2 norm from before.

    Raises:
        NonFiniteError: the norm is NaN or infinite; nothing was changed.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    total = torch.nn.utils.get_total_norm(gradients)
    norm = float(total)
    if not math.isfinite(norm):
        raise gradient_error(norm)
    if 0 < max_norm < norm + 1e-6:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, total)
    return norm


def whole_pieces(parameters: Mapping[str, Tensor]) -> list[Piece]:
    """Return pieces for flats that are the parameters themselves, in the same order."""
    return [
        Piece(name, 0, parameter.numel(), index, 0)
        for index, (name, parameter) in enumerate(parameters.items())
    ]


def _add_gradient(parameter: nn.Parameter, gradient: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad += gradient


def _float32(parameter: nn.Parameter) -> nn.Parameter:
    if parameter.dtype == torch.float32:
        return parameter
    return nn.Parameter(parameter.detach().float())
