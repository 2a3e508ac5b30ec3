"""Every place where a part can be exchanged or optional behaviour can enter. Read this first.

*Choose exactly one*: a strategy (adapter, optimizer, lr schedule, timestep sampler, loss,
weighting, engine, solver, probe) has one or two methods and knows nothing of the others.
*Choose any number*: a `Technique` overrides only the hooks it needs.

Every plug-in has the same shape: a nested `Config` (an `Options` class), a constructor
`(config, build)`, and its methods. `BuildContext` is all it is given at birth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.contract.options import Options
from trainer.contract.sigma_distributions import SigmaDistribution
from trainer.contract.variants import Variant
from trainer.core.types import Batch, LossTerm, NoisyInput, StepResult


def _no_texts(text: str) -> Tensor:
    raise RuntimeError(f"nothing is encoded here, and {text!r} is asked for")


LossObserver = Callable[[Batch, Tensor, Tensor], None]
"""Takes a batch, its sigma_B and the loss of each item, (B,) float32 on the device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildContext:
    """What a plug-in may need at birth, and nothing else."""

    variant: Variant
    seed: int
    device: torch.device
    total_steps: int
    encoded: Callable[[str], Tensor] = _no_texts
    """Gives the embedding, (T, D) float32 on the CPU, of a text that `Technique.texts` named; for
    use while training, not at birth."""
    resumes: bool = False
    """The weights come from a checkpoint: what they begin with is not needed."""
    observe_loss: LossObserver | None = None
    """Told of the loss of each item, for figures; None: nobody asks."""


class TimestepSampler(Protocol):
    """Draws sigma in [0, 1]. `frame_tokens` are the tokens of one latent frame of the sample."""

    def sample(self, num: int, generator: torch.Generator, frame_tokens: int) -> Tensor:
        """Return `num` sigmas, float32 on the CPU."""
        ...

    def distribution(self, frame_tokens: int) -> SigmaDistribution:
        """Return what `sample` draws from."""
        ...


class Loss(Protocol):
    """Compares prediction and target."""

    def __call__(self, prediction: Tensor, target: Tensor, sigma_B: Tensor) -> Tensor:
        """Return the loss of every element, float32, same shape as prediction and target."""
        ...


class Weighting(Protocol):
    """Weight of the base loss as a function of sigma."""

    def __call__(self, sigma_B: Tensor) -> Tensor:
        """Return one weight per sample."""
        ...


class LRSchedule(Protocol):
    """Course of the learning rate after the warm-up."""

    def factor(self, progress: float, num_steps: int) -> float:
        """Return the multiplier of the learning rate.

        Args:
            progress: how far the course is, in [0, 1]: 0 at its first step, 1 at its last one.
            num_steps: of the course, that is, after the warm-up.
        """
        ...


@runtime_checkable
class LossSchedule(LRSchedule, Protocol):
    """A course that goes by the losses of the run, and not by the step alone."""

    watches: Literal["training", "validation"]
    """Which losses."""

    def observe(self, loss: float) -> None:
        """Take the loss of a step, or a measurement of the validation loss; the same on all ranks.

        It counts from the next step on.
        """
        ...

    def state(self) -> dict[str, float]:
        """Return what a resumed run goes on with, as JSON can hold it."""
        ...

    def load_state(self, state: Mapping[str, float]) -> None:
        """Take back what `state` gave."""
        ...


class OptimizerFactory(Protocol):
    """Makes a torch optimizer."""

    elementwise: ClassVar[bool]
    """The update of an element depends on that element alone, so that ZeRO may cut tensors."""
    state_names: ClassVar[tuple[str, ...]]
    """Per-element state tensors, saved by parameter; empty: saved as the engine holds them."""
    keeps_low_precision: ClassVar[bool] = False
    """Updates bf16 weights as they are, where others need float32 copies of them."""

    def build(self, parameters: Iterable[Mapping[str, Any]], lr: float) -> torch.optim.Optimizer:
        """Return the optimizer for parameter groups `{"params": [...], ...}`."""
        ...


class Adapter(Protocol):
    """Makes part of a transformer trainable and writes it as a file people take away."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """Return what the meaning of the trained tensors depends on, by its name for people.

        The same tensors are another model at another scale, so a checkpoint goes on only with
        equal facts. Values can be written as JSON.
        """
        ...

    def inject(self, transformer: nn.Module, seed: int) -> None:
        """Freeze the transformer and add or free what is trained.

        Raises:
            ConfigError: the patterns select nothing.
        """
        ...

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by canonical name, in a fixed order."""
        ...

    def lr_scales(self) -> Mapping[str, float]:
        """Return factors of the learning rate by name in `trainable`; absent: 1."""
        ...

    def techniques(self) -> Sequence[Technique]:
        """Return what this kind does beyond its layers while it trains, once it is injected."""
        ...

    def suspended(self) -> AbstractContextManager[None]:
        """Let the transformer act as it did before anything was trained, while this is open.

        Raises:
            RuntimeError: the weights themselves are trained, so that it cannot.
        """
        ...

    def write_output(
        self,
        state: Mapping[str, Tensor],
        path: Path,
        *,
        layout: str,
        dtype: torch.dtype,
        metadata: Mapping[str, str],
    ) -> None:
        """Write the output file from full tensors keyed as in `trainable`, and verify it."""
        ...


class Predict(Protocol):
    """One more forward of the transformer, with every block hook switched off."""

    def __call__(self, noisy: NoisyInput, batch: Batch) -> Tensor:
        """Return the velocity, (B, C, F, H, W)."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockState:
    """What one transformer block receives and returns; hooks may replace `tokens_BLD`.

    `kept_L` holds the positions of the tokens still present, or None when all are.
    """

    tokens_BLD: Tensor
    kept_L: Tensor | None = None


class BlockHook(Protocol):
    """Runs around every transformer block, outside gradient checkpointing and compile."""

    def before_block(self, index: int, state: BlockState) -> BlockState:
        """Return what block `index` shall receive."""
        ...

    def after_block(self, index: int, state: BlockState) -> BlockState:
        """Return what the next block shall receive."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeShot:
    """One video a probe wants to see."""

    prompt: str
    seed: int


class Probe(Protocol):
    """Measures on generated videos what a task is about, e.g. whether a concept was learned."""

    def shots(self) -> Sequence[ProbeShot]:
        """Return what is to be sampled; the same list each time."""
        ...

    def judge(self, videos: Sequence[NDArray[np.uint8]]) -> Mapping[str, float]:
        """Return named figures, shares in [0, 1], larger is better unless the name says so.

        Args:
            videos: one (F, H, W, 3) per shot, in the order of `shots`.
        """
        ...


class Maturity(StrEnum):
    """How far a technique's benefit is shown."""

    CORE = "core"
    VALUED = "valued"
    EXPERIMENTAL = "experimental"


class Need(StrEnum):
    """What a technique requires of the run; checked before it starts."""

    BATCH_OVER_ONE = "batch_over_one"
    EXTRA_FORWARD = "extra_forward"
    FULL_GRADS = "full_grads"
    BASE_MODEL = "base_model"
    MASKS = "masks"


class TrainingState(Protocol):
    """What an engine holds, for techniques that look at it or change it between two steps."""

    @property
    def has_elementwise_state(self) -> bool:
        """Whether the optimizer keeps one value an element, which `scale_state` needs."""
        ...

    def overwrite(self, values: Mapping[str, Tensor]) -> None:
        """Replace trained parameters, given whole and equal on all ranks. A collective call."""
        ...

    def scale_state(self, factors: Mapping[str, Tensor]) -> None:
        """Multiply the optimizer's state of parameters, value by value; step counts stay.

        Raises:
            ValueError: not `has_elementwise_state`, or no such parameter.
        """
        ...

    def mean_over_ranks(self, values: Tensor) -> Tensor:
        """Return the mean of a float32 tensor over all ranks, on its device. A collective call."""
        ...


class Technique:
    """Optional behaviour. Override only what you need; every default does nothing."""

    reference: ClassVar[str] = ""
    maturity: ClassVar[Maturity] = Maturity.EXPERIMENTAL
    needs: ClassVar[frozenset[Need]] = frozenset()
    Config: ClassVar[type[Options]]

    @classmethod
    def needs_of(cls, options: Options) -> frozenset[Need]:
        """Return what it requires with these options of `Config`."""
        return cls.needs

    @classmethod
    def texts(cls, options: Options, captions: Iterable[str]) -> Iterable[str]:
        """Return what must be encoded beside the captions, so that `BuildContext.encoded` has it.

        Args:
            options: of `Config`.
            captions: all of the dataset.

        Raises:
            ConfigError: the captions are none that this can work with.
        """
        return ()

    def connect(self, state: TrainingState) -> None:
        """Take what the engine holds, once, before the first step and before `load_state_dict`.

        Raises:
            ConfigError: the engine or its optimizer cannot do what this needs.
        """

    def lr_factor(self, step: int) -> float:
        """Return what the learning rate of update number `step`, from 1, is multiplied with.

        It depends on the step alone, so that resuming needs no state.
        """
        return 1.0

    def block_hooks(self) -> Iterable[BlockHook]:
        """Return hooks around each block; before-hooks run in config order, after-hooks back."""
        return ()

    def modules(self) -> Mapping[str, nn.Module]:
        """Return extra trainable modules, saved with checkpoints but never with the output."""
        return {}

    def edit_batch(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Change the clean batch before noise is added."""
        return batch

    def edit_noisy(self, noisy: NoisyInput, batch: Batch, generator: torch.Generator) -> NoisyInput:
        """Change what the transformer sees."""
        return noisy

    def edit_target(
        self, target: Tensor, batch: Batch, noisy: NoisyInput, predict_base: Predict
    ) -> Tensor:
        """Change what the prediction is compared with; called before there is a prediction.

        `predict_base` gives the velocity of the model without what is trained, and no gradients;
        who calls it has `Need.BASE_MODEL`, and calls it as often for every batch, or else says in
        `asks_base` for which ones.
        """
        return target

    def asks_base(self, batch: Batch) -> bool | None:
        """Tell whether `edit_target` calls `predict_base` once for this batch, or not at all.

        None: it does the same for every batch. Processes that share weights (ZeRO-3) must run as
        many forwards, so that where one asks, the others run one, too.
        """
        return None

    def loss_map(self, batch: Batch, noisy: NoisyInput) -> Tensor | None:
        """Return a weight per element of the base loss, broadcastable to (B, C, F, H, W)."""
        return None

    def loss_terms(
        self, batch: Batch, noisy: NoisyInput, prediction: Tensor, predict: Predict
    ) -> list[LossTerm]:
        """Return further terms of the loss."""
        return []

    def after_step(self, step: int) -> None:
        """Act after the weights were updated."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return tensors that a checkpoint must hold beyond those of `modules`."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""


@runtime_checkable
class Engine(Protocol):
    """Runs steps on one or several processes. The wrapped module maps a `Batch` to loss terms."""

    rank: int
    world_size: int
    device: torch.device

    def forward_backward(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Run the microbatches of one step; return each loss term's mean over all ranks.

        Raises:
            NonFiniteError: on every rank, before any gradient of that microbatch exists; names
                the term and the clips.
        """
        ...

    def update(self, lr: float) -> StepResult:
        """Clip, step the optimizer with this learning rate, zero the gradients."""
        ...

    def full_parameters(self) -> dict[str, Tensor]:
        """Return the trained parameters, whole, float32 on the CPU, by canonical name.

        A collective call; ranks other than 0 may get an empty dict.
        """
        ...

    @property
    def has_average(self) -> bool:
        """Whether a running average of the weights is kept."""
        ...

    def inference_weights(self, *, averaged: bool) -> AbstractContextManager[None]:
        """Have the weights in the module that are for use, for the duration of a block.

        Training goes on with the same bits as without it. A collective call.

        Args:
            averaged: the running average, where there is one that has begun; else the trained
                weights, to which some optimizers have to switch.
        """
        ...

    def save_state(self, folder: Path) -> None:
        """Write weights and optimizer state into `folder`. A collective call."""
        ...

    def load_state(self, folder: Path) -> None:
        """Restore what `save_state` wrote. A collective call.

        Raises:
            ModelFileError: damaged, or of another set of trained parameters.
        """
        ...

    def barrier(self) -> None:
        """Wait until every rank is here."""
        ...

    def any_rank(self, flag: bool) -> bool:
        """Return whether `flag` is set on some rank. A collective call."""
        ...

    def close(self) -> None:
        """Free what the engine holds; the module stays usable unless ZeRO-3 shards it."""
        ...
