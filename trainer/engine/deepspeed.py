"""DeepSpeed behind the engine's seam. The only module that imports deepspeed."""

from __future__ import annotations

import importlib.util
import os
import shutil
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trainer.contract.errors import ConfigError, RunError
from trainer.core.seams import OptimizerFactory
from trainer.core.types import Batch
from trainer.engine.deepspeed_config import PERSISTENCE_THRESHOLD, build_deepspeed_config
from trainer.engine.finite import gradient_error
from trainer.engine.local import clip_gradients, whole_pieces
from trainer.engine.offload import NO_OFFLOAD, Offload
from trainer.engine.process_group import World
from trainer.engine.running_average import AverageSettings
from trainer.engine.state_files import EngineState, Piece, always_there
from trainer.engine.stepping import SteppingEngine, fill_missing_gradients, parameter_groups
from trainer.engine.swapped import gather_masters, inner_step, remove_files, resident


def is_installed() -> bool:
    """Tell whether DeepSpeed can be imported, without importing it."""
    return importlib.util.find_spec("deepspeed") is not None


def async_io_obstacle(device: torch.device) -> str | None:
    """Return why offload to `nvme` cannot work here; None where its module can be built.

    DeepSpeed compiles it in the first run that needs it, for minutes.
    """
    _import_deepspeed(device)
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from torch.utils import cpp_extension

    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler ({compiler})"
    if device.type == "cuda" and cpp_extension.CUDA_HOME is None:
        return "there is no CUDA toolkit (nvcc)"
    if not AsyncIOBuilder().is_compatible(verbose=False):
        return "the headers of libaio are missing"
    return None


def cpu_adam(
    parameters: list[dict[str, Any]], device: torch.device, **options: Any
) -> torch.optim.Optimizer:
    """Return DeepSpeed's AdamW for weights in RAM. Its first use compiles it, for minutes.

    `device` is the one that the run trains on.

    Raises:
        ConfigError: it cannot be compiled or loaded.
    """
    _import_deepspeed(device)
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    try:
        optimizer: torch.optim.Optimizer = DeepSpeedCPUAdam(parameters, **options)
    except (RuntimeError, ImportError, OSError) as error:
        raise ConfigError(
            f"DeepSpeed's AdamW for the CPU cannot be compiled: {error.__cause__ or error}",
            hint="install a C++ compiler (Debian, Ubuntu: g++), or set optimizer.kind = 'adamw'",
        ) from error
    return optimizer


def cpu_adam_obstacle() -> str | None:
    """Return why `cpu_adam` cannot be compiled here; None where it can be tried."""
    compiler = os.environ.get("CXX", "c++")
    return None if shutil.which(compiler) else f"there is no C++ compiler ({compiler})"


class DeepSpeedEngine(SteppingEngine):
    """`core.seams.Engine` over DeepSpeed, ZeRO stages 0 to 3.

    The process group must exist (`process_group.joined`), also for a single process.

    Args:
        module: the whole step; maps a `Batch` to loss terms, each of shape ().
        trainable: the trained parameters by canonical name. Float32, unless
            `full_finetune_bf16`.
        optimizer_factory: makes the optimizer.
        world: this process's place.
        max_grad_norm: gradients are scaled down to this norm; 0 leaves them.
        gradient_accumulation_steps: microbatches per update.
        zero_stage: 1 shards optimizer state over the ranks, 2 gradients too, 3 weights too.
        full_finetune_bf16: every parameter becomes bf16, those trained have fp32 masters.
        lr_scales: factor of the learning rate by canonical name, 1 where absent.
        persistence_threshold: stage 3 keeps parameters with fewer elements whole.
        offload: what waits outside the GPU.
        max_grad_value: each element of the gradients is cut to this size after that; 0 leaves them.
        average: how the weights are averaged; None: they are not.

    Raises:
        ConfigError: DeepSpeed is missing, or the combination trains wrongly.
    """

    def __init__(  # noqa: PLR0913 - LocalEngine's keywords and ZeRO's, each with a value of its own
        self,
        module: nn.Module,
        trainable: Mapping[str, nn.Parameter],
        optimizer_factory: OptimizerFactory,
        *,
        world: World,
        max_grad_norm: float,
        gradient_accumulation_steps: int,
        zero_stage: int = 0,
        full_finetune_bf16: bool = False,
        lr_scales: Mapping[str, float] | None = None,
        persistence_threshold: int = PERSISTENCE_THRESHOLD,
        offload: Offload = NO_OFFLOAD,
        max_grad_value: float = 0.0,
        average: AverageSettings | None = None,
    ) -> None:
        super().__init__(module, trainable, world, gradient_accumulation_steps)
        self.config = build_deepspeed_config(
            zero_stage=zero_stage,
            gradient_accumulation_steps=gradient_accumulation_steps,
            max_grad_norm=max_grad_norm,
            full_finetune_bf16=full_finetune_bf16,
            elementwise_optimizer=optimizer_factory.elementwise,
            num_trained=sum(value.numel() for value in trainable.values()),
            largest_weight=max(value.numel() for value in module.parameters()),
            persistence_threshold=persistence_threshold,
            offload=offload,
        )
        if not full_finetune_bf16:
            _require_float32(trainable)
        if offload.parameters == "nvme" and not full_finetune_bf16:
            _require_one_dtype(module)
        if offload.optimizer == "nvme" and not optimizer_factory.state_names:
            raise ConfigError(
                "only state of one value a weight can be offloaded to nvme",
                hint="use optimizer.kind = 'adamw'",
            )
        if offload.optimizer == "nvme" and average is not None:
            raise ConfigError(
                "weights that are offloaded to nvme cannot be averaged",
                hint="set ema.decay = 0, or distributed.offload_optimizer = 'cpu'",
            )
        self._stage = zero_stage
        self._bf16 = full_finetune_bf16
        self._offload = offload
        self._max_grad_norm = max_grad_norm
        self._state_names = optimizer_factory.state_names
        self._shapes = {name: tuple(value.shape) for name, value in trainable.items()}
        self._used: list[set[int]] = [set()]
        self._deepspeed = _import_deepspeed(world.device)
        self._engine = self._initialize(module, optimizer_factory, lr_scales or {}, self.config)
        self._watches = self._watch_use() if zero_stage else []
        inner = self._engine.optimizer.optimizer if zero_stage else self._engine.optimizer
        self._adopt(inner, max_grad_value=max_grad_value, average=average)

    def full_parameters(self) -> dict[str, Tensor]:
        """Return the trained parameters, whole, float32 on the CPU; empty but on rank 0.

        A collective call.
        """
        whole: dict[str, Tensor] = {}
        for name, value in self._whole_parameters():
            if self.rank == 0:
                whole[name] = value.detach().to("cpu", torch.float32, copy=True)
        return {name: whole[name] for name in self._trainable if name in whole}

    def _whole_parameters(self) -> Iterator[tuple[str, Tensor]]:
        if self._in_files:
            yield from gather_masters(self._engine.optimizer, self._trainable)
            return
        sharded = self._stage == 3 or self._bf16
        gather = self._deepspeed.utils.safe_get_full_fp32_param
        for name, parameter in self._trainable.items():
            yield name, gather(parameter) if sharded else parameter

    def close(self) -> None:
        """Free what DeepSpeed holds. The module stays usable, but stays sharded under stage 3."""
        for watch in self._watches:
            watch.remove()
        engine = self._engine
        engine.module_forward_pre_hook.remove()
        engine.module_forward_post_hook.remove()
        engine.destroy()
        if self._offload.nvme_path is not None:
            remove_files(self._offload.nvme_path, self.rank)
        for parameter in self._trainable.values():
            parameter.grad = None

    def _initialize(
        self,
        module: nn.Module,
        optimizer_factory: OptimizerFactory,
        lr_scales: Mapping[str, float],
        config: dict[str, Any],
    ) -> Any:
        if self._stage == 3:
            if self._bf16:  # else parameters of another dtype (the time embedding) stay as they are
                module.bfloat16()
            # Shards one parameter after the other, where `initialize` would move the whole module
            # to the device first. The form `with zero.Init():` would make all of it fp32.
            self._deepspeed.zero.Init(module=module, config_dict_or_path=config)
            for buffer in module.buffers():  # frozen adapters: only parameters were moved
                buffer.data = buffer.data.to(self.device)
        groups = parameter_groups(self._trainable, lr_scales)
        engine, *_ = self._deepspeed.initialize(
            model=module,
            model_parameters=list(self._trainable.values()),
            optimizer=optimizer_factory.build(groups, lr=0.0),
            config=config,
            dist_init_required=False,
        )
        if self._stage == 0 and self.world_size == 1:
            engine.enable_backward_allreduce = False  # would copy all gradients to and fro
        return engine

    def _forward(self, batch: Batch) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = self._engine(batch)
        return terms

    def _backward(self, loss: Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss)  # divides by the number of microbatches itself
        if self._stage and not last:
            self._used.append(set())

    def _after_backward(self) -> None:
        if self._stage == 0:
            fill_missing_gradients(self._trainable.values())
            return
        used, self._used = self._used, [set()]
        if self._keeps_gradients:
            self._refuse_idle(set().union(*used))
        if self.world_size > 1:
            self._refuse_divergence(used)

    def _param_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self._engine.optimizer.param_groups
        return groups

    def _step(self) -> float:
        if self._stage == 0:
            norm = clip_gradients(list(self._trainable.values()), self._max_grad_norm)
            self._engine.step()
            return norm
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        if not self._engine.was_step_applied():
            raise gradient_error(norm)
        return norm

    def _state(self) -> EngineState:
        return EngineState(
            engine="deepspeed",
            world_size=self.world_size,
            zero_stage=self._stage,
            rank=self.rank,
            shapes=self._shapes,
            flats=self._flats(),
            pieces=self._pieces(),
            own=self._stage > 0 or self.rank == 0,
            optimizer=self._optimizer,
            state_names=self._state_names,
            inner_step=self._inner_step,
            resident=self._resident if self._in_files else always_there,
            grouped=self._grouped,
            counters=self._counters,
            average=self._average,
        )

    @property
    def _in_files(self) -> bool:
        return self._offload.optimizer == "nvme"

    def _resident(self, index: int, changed: bool) -> AbstractContextManager[None]:
        return resident(self._engine.optimizer, index, changed=changed)

    def _flats(self) -> list[Tensor]:
        if self._stage == 0:
            return list(self._trainable.values())
        optimizer = self._engine.optimizer
        if self._stage == 3:
            return list(optimizer.fp32_partitioned_groups_flat)
        return list(optimizer.single_partition_of_fp32_groups)

    def _pieces(self) -> list[Piece]:
        if self._stage == 0:
            return whole_pieces(self._trainable)
        cut = self._piece_of_stage_3 if self._stage == 3 else _piece_of_stage_1_2
        pieces = (cut(name, parameter) for name, parameter in self._trainable.items())
        return [piece for piece in pieces if piece is not None]

    def _piece_of_stage_3(self, name: str, parameter: Any) -> Piece | None:
        optimizer = self._engine.optimizer
        flat, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = self.rank * size
        numel = min(size, parameter.ds_numel - start)  # the last shard is padded
        return Piece(name, start, numel, flat, offset) if numel > 0 else None

    def _inner_step(self) -> None:
        if self._in_files:
            inner_step(self._engine.optimizer)
            return
        with self._grouped():
            self._optimizer.step()

    @contextmanager
    def _grouped(self) -> Iterator[None]:
        if self._stage != 3:
            yield
            return
        self._engine.optimizer._set_fp32_optimizer_param_groups()  # empty outside `step`
        try:
            yield
        finally:
            self._engine.optimizer._clear_fp32_optimizer_param_groups()

    def _refresh_weights(self) -> None:
        optimizer = self._engine.optimizer
        if self._stage in {1, 2}:
            optimizer.update_lp_params()
        elif self._stage == 3:
            optimizer._partition_all_parameters()
            for index in range(len(optimizer.fp16_groups)):
                with resident(optimizer, index, changed=False):
                    optimizer._reassign_or_swap_out_partitioned_parameters(index)
            if optimizer.persistent_parameters:
                first = optimizer.persistent_parameters[0]
                first.all_gather(optimizer.persistent_parameters)

    def _watch_use(self) -> list[Any]:
        def watch(index: int) -> Any:
            return lambda parameter: self._used[-1].add(index)

        return [
            parameter.register_post_accumulate_grad_hook(watch(index))  # type: ignore[no-untyped-call]
            for index, parameter in enumerate(self._trainable.values())
        ]

    @property
    def _keeps_gradients(self) -> bool:
        """Whether a parameter that gets no gradient would be updated with its last one."""
        return self._stage == 3 or self._offload.optimizer != "none"

    def _refuse_idle(self, used: set[int]) -> None:
        idle = [name for i, name in enumerate(self._trainable) if i not in used]
        if idle:
            raise RunError(
                f"{len(idle)} trained parameters took no part in this step, e.g. {idle[0]}; "
                "ZeRO stage 3 and an offloaded optimizer would update them with an old gradient",
                hint="set distributed.zero_stage = 2 and offload_optimizer = 'none', or do not "
                "train them",
            )

    def _refuse_divergence(self, used: list[set[int]]) -> None:
        # 24 bits, so that the number survives the float32 of the gather.
        print_of_use = zlib.crc32(repr([sorted(part) for part in used]).encode()) & 0xFFFFFF
        prints = self._world.gather(torch.tensor([float(print_of_use)])).flatten().tolist()
        if len(set(prints)) > 1:
            raise RunError(
                "the ranks trained different parameters in one step; ZeRO would mix up their "
                "gradients",
                hint="set distributed.zero_stage = 0, or switch off what chooses by rank",
            )


def _piece_of_stage_1_2(name: str, parameter: Any) -> Piece | None:
    mapping = parameter._hp_mapping
    if mapping is None:  # lies on other ranks
        return None
    inside, held = mapping.lp_fragment_address, mapping.hp_fragment_address
    return Piece(name, inside.start, inside.numel, mapping.param_group_index, held.start)


def _require_float32(trainable: Mapping[str, nn.Parameter]) -> None:
    low = [name for name, value in trainable.items() if value.dtype != torch.float32]
    if low:
        raise ValueError(
            f"{len(low)} trained parameters are not float32, e.g. {low[0]}; without "
            "full_finetune_bf16 they would have no fp32 masters"
        )


def _require_one_dtype(module: nn.Module) -> None:
    kinds = {parameter.dtype for parameter in module.parameters()}
    if len(kinds) > 1:
        names = " and ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
        raise ConfigError(
            f"DeepSpeed reads all weights from nvme as one dtype, and these are {names}",
            hint="set distributed.offload_parameters = 'cpu'",
        )


def _import_deepspeed(device: torch.device) -> Any:
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed's own calls, each of which torch 2.13 comments on in every step of ZeRO-3.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise ConfigError(
            f"DeepSpeed cannot be imported: {error}",
            hint="install it (Linux only), or set distributed.engine = 'local'",
        ) from error
    if device.type == "cpu":
        # Else the first use compiles a C++ extension for minutes, or fails without a compiler.
        deepspeed.ops.__compatible_ops__ = {}
    return deepspeed
