"""GPU memory while training: what is there all the time, and the peak of a step."""

from __future__ import annotations

from trainer.contract.memory_model.block import BlockShape
from trainer.contract.memory_model.offload import (
    FLOAT32,
    gathered_bytes,
    gpu_buffers,
    optimizer_place,
    weights_on_gpu,
)
from trainer.contract.memory_model.optimizers import optimizer_memory
from trainer.contract.memory_model.stack import StackOptions, training_peak
from trainer.contract.memory_model.techniques import uses_masks
from trainer.contract.memory_model.workload import Workload
from trainer.contract.optimizer_traits import traits_of

Parts = dict[str, float]

DRAWN_LATENTS = 3
"""Copies of the latents that a forward holds: noise, its mixture with the latents, the target."""
LOSS_LATENTS = 7
"""Copies of the latents while the loss is computed: noise, its mixture with the latents, the
prediction in two orders, the target, their difference and its square."""
MASK_WEIGHTS = 2
"""Weights of a masked loss that are alive at once beside the mask."""
BUCKET_ELEMENTS = 50_000_000
"""Most gradients that ZeRO reduces together; `engine.deepspeed_config` sets it."""
REDUCED_TOGETHER = 500_000_000
"""Most gradients that DeepSpeed reduces together without ZeRO."""
EXCHANGED_TOKENS = 2
"""Copies of a rank's tokens while they are exchanged with those that share the clip: what is sent,
and what arrives."""


def standing_parts(work: Workload) -> Parts:
    """Return what is on the GPU through the whole training."""
    trained, world = work.adapters * work.trained_parameters, work.world_size
    stage = work.zero_stage
    sharded_optimizer = world if stage >= 1 else 1
    parts: Parts = {"weights": weights_on_gpu(work)}
    if work.companion_bytes:
        parts["frozen adapters"] = work.companion_bytes
    if work.swapped:
        parts["block swap"] = work.ring_bytes
    if not work.full:
        parts["adapter"] = (trained + work.adapters * work.targets.held) * FLOAT32
    if optimizer_place(work) == "none":
        if stage >= 1 or _has_masters(work):
            parts["fp32 masters"] = trained * FLOAT32 / sharded_optimizer
        parts["optimizer"] = work.adapters * work.optimizer_state / sharded_optimizer
        if work.config.ema.decay and work.config.ema.device == "train":
            parts["average of weights"] = work.adapters * work.average_bytes / sharded_optimizer
    else:
        parts["offload buffers"] = gpu_buffers(work)
    if stage and world >= 1:
        buckets = 1 if stage == 1 else 2  # with overlap one is filled while one is sent
        bucket = min(BUCKET_ELEMENTS, work.trained_parameters)
        parts["ZeRO buckets"] = buckets * bucket * work.gradient_element
    if stage == 3:
        parts["ZeRO-3 gathered weights"] = gathered_bytes(work)
    parts["inputs"] = inputs_bytes(work)
    return parts


def inputs_bytes(work: Workload) -> float:
    """Return latents, text, image features and rotary table of a batch."""
    shape, batch = work.shape, work.clip.batch
    size: float = work.latent_bytes
    size += work.latent_bytes / 2 * (shape.in_channels - shape.out_channels) / shape.out_channels
    text = batch * shape.text_len
    size += text * (2 * shape.text_dim + shape.dim * work.element)
    if work.targets.front:  # what the text embedding and the patch embedding read in their backward
        size += text * (shape.text_dim + 3 * shape.dim) * work.element
        size += work.latent_bytes / 4 * work.element * shape.in_channels / shape.out_channels
    if shape.image_dim:
        images = batch * shape.image_tokens * (2 if shape.image_position_embedding else 1)
        size += images * (2 * shape.image_dim + shape.dim * work.element)
    if uses_masks(work.config):
        size += _mask_bytes(work)
    return size + work.tokens * shape.head_dim * FLOAT32


def _mask_bytes(work: Workload) -> float:
    """Return one value for each place of the latents, float32."""
    return work.latent_bytes / work.shape.out_channels


def step_peak(work: Workload) -> tuple[Parts, float]:
    """Return what a step takes at its peak, and the peak of the weights' update."""
    gradient = work.gradient_element
    total = work.trained_parameters * gradient
    stage, world = work.zero_stage, work.world_size
    offloads = optimizer_place(work) != "none"
    share = 1 / world if stage >= 2 else 1.0
    if stage >= 2 and offloads:
        share = 0.0  # a rank's own part goes to RAM
    waiting = 0.0
    if work.config.training.gradient_accumulation_steps > 1:
        # Those of the microbatches before are there from the start.
        if _adds_in_float32(work):
            waiting = work.trained_parameters * FLOAT32
        else:
            waiting, share = total * share, 0.0
    stack = training_peak(
        work.block_shape(),
        work.targets.blocks,
        stack_options(work),
        first=work.targets.first,
        drawn=DRAWN_LATENTS * work.latent_bytes,
        head=_head(work),
        gradient_share=share,
    )
    parts: Parts = {
        "gradients": waiting + stack.gradients,
        "activations": stack.activations,
        "live block": stack.live_block,
    }
    parts |= exchange_parts(work.block_shape(), work.sequence_ranks)
    return parts, _update_bytes(work, total)


def exchange_parts(shape: BlockShape, ranks: int) -> Parts:
    """Return what `ranks` processes that share a clip exchange of a block's tokens at a time."""
    return {"sequence exchange": EXCHANGED_TOKENS * shape.tokens_bytes} if ranks > 1 else {}


def stack_options(work: Workload) -> StackOptions:
    """Return how the config keeps activations."""
    memory = work.config.memory
    return StackOptions(
        every=memory.checkpointed_every,
        keep_attention=memory.keep_attention,
        offload=memory.offload_checkpoints,
    )


def _head(work: Workload) -> float:
    """Return what head and loss take at most, beside the tokens."""
    shape = work.block_shape()
    normed = 1 if work.clip.batch == 1 else 2
    # Of a clip that is shared each rank predicts a part, gets the others', and has the whole loss.
    gathered = work.latent_bytes if work.sequence_ranks > 1 else 0
    loss: float = LOSS_LATENTS * work.latent_bytes
    if uses_masks(work.config):  # the loss before and after it is weighed, and the weights
        loss += work.latent_bytes + MASK_WEIGHTS * _mask_bytes(work)
    return (normed + 1) * shape.tokens_bytes + loss + gathered


def _adds_in_float32(work: Workload) -> bool:
    """Whether bf16 gradients are added to float32 ones after each microbatch."""
    return _has_masters(work) and work.zero_stage == 0


def _has_masters(work: Workload) -> bool:
    """Whether weights in bf16 are trained through float32 copies."""
    keeps = traits_of(work.config.optimizer.kind).bf16_only
    return work.full and work.element != FLOAT32 and not keeps


def _update_bytes(work: Workload, total: float) -> float:
    """Return gradients and temporaries while the weights are updated."""
    stage, world, trained = work.zero_stage, work.world_size, work.trained_parameters
    memory = optimizer_memory(work.config.optimizer.kind)
    if stage == 0:
        if _adds_in_float32(work):
            return trained * (FLOAT32 + memory.temporary)
        reduced = min(trained, REDUCED_TOGETHER) * FLOAT32 if world > 1 else 0.0
        return total + max(reduced, trained * memory.temporary)
    if optimizer_place(work) != "none":
        return total if stage == 1 else 0.0
    # ZeRO updates its shard in float32, from a float32 copy of its gradients.
    copy = trained / world * (FLOAT32 + memory.temporary)
    return (total if stage == 1 else total / world) + copy
