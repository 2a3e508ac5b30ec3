"""What goes with what in `[optimizer]`, `[lr_schedule]` and `[ema]`."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.contract.config import RunConfig
from trainer.contract.errors import Problem
from trainer.contract.experts import trains_both
from trainer.contract.offload_rules import OPTIMIZER_KEY
from trainer.contract.optimizer_traits import traits_of
from trainer.contract.plugin_options import all_options

KIND_KEY = "optimizer.kind"
EMA_KEY = "ema.decay"


def optimizer_rule(config: RunConfig) -> Iterator[Problem]:
    """Yield where the optimizer and the rest of the config exclude one another."""
    yield from _sharding(config)
    yield from _offload(config)
    yield from _low_precision(config)
    yield from _rates(config)


def schedule_rule(config: RunConfig) -> Iterator[Problem]:
    """Yield what is wrong with the course of the learning rate."""
    schedule = config.lr_schedule
    if schedule.warmup_steps and schedule.warmup_ratio:
        yield Problem(
            "the warm-up in steps and as a share of all steps at once",
            "lr_schedule.warmup_ratio",
            hint="keep warmup_steps, or warmup_ratio",
        )
    if schedule.kind == "plateau":
        yield from _plateau(config)


def _plateau(config: RunConfig) -> Iterator[Problem]:
    options = all_options("lr_schedule", "plateau", config.lr_schedule.options("kind"))
    if trains_both(config):
        yield Problem(
            "the losses of two experts in turns are one course, and each has a rate of its own",
            "lr_schedule.kind",
            hint='train one expert (model.expert), or use another schedule, e.g. "cosine"',
        )
    if options["watch"] == "validation" and not config.validation.repeats:
        yield Problem(
            "it goes by the validation loss, and none is measured",
            "lr_schedule.watch",
            hint='set validation.every_steps and validation.split, or watch = "training"',
        )
    usual = all_options("lr_schedule", "plateau", {})["window_steps"]
    if options["watch"] == "validation" and options["window_steps"] != usual:
        yield Problem(
            "each measurement of the validation loss counts; steps do not",
            "lr_schedule.window_steps",
            hint='leave it out, or set watch = "training"',
        )


def average_rule(config: RunConfig) -> Iterator[Problem]:
    """Yield why the weights cannot be averaged, or an option of it has no meaning."""
    ema = config.ema
    if not ema.decay:
        for key in sorted(ema.model_fields_set - {"decay"}):
            if getattr(ema, key) != type(ema).model_fields[key].default:
                yield Problem(
                    "has a meaning only where weights are averaged",
                    f"ema.{key}",
                    hint="set ema.decay = 0.999, or leave it out",
                )
        return
    if traits_of(config.optimizer.kind).averages:
        yield Problem(
            f"{config.optimizer.kind} averages the weights itself; this would average the weights "
            "that it only takes gradients at",
            EMA_KEY,
            hint="leave it out, or use another optimizer",
        )
    if config.adapter.kind == "relora":
        yield Problem(
            "ReLoRA starts its factors anew after each cycle: an average over two cycles is the "
            "update of neither",
            EMA_KEY,
            hint='leave it out, or set adapter.kind = "lora"',
        )
    if config.distributed.offload_optimizer == "nvme":
        yield Problem(
            "trained weights that wait on an SSD cannot be averaged in every step",
            EMA_KEY,
            hint='leave it out, or set distributed.offload_optimizer = "cpu"',
        )


def optimizer_notes(config: RunConfig) -> Iterator[str]:
    """Yield what works and is likely not meant."""
    kind = config.optimizer.kind
    traits = traits_of(kind)
    rates = {"optimizer.learning_rate": config.optimizer.learning_rate}
    for name in ("high_noise", "low_noise"):
        own = getattr(config, name).learning_rate
        if own is not None:
            rates[f"{name}.learning_rate"] = own
    lowest, usual, highest = traits.lowest, traits.learning_rate, traits.highest
    if config.optimizer.options("kind").get("lr_adjust") == "original":  # Muon's own scale
        lowest, usual, highest = 1e-3, 0.02, 0.5
    if config.optimizer.options("kind").get("step_size", "fixed") != "fixed":  # Adafactor's own
        kind, lowest, usual, highest = f"{kind} with a relative step", 0.1, 1.0, 10.0
    for key, rate in rates.items():
        if not lowest <= rate <= highest:
            word = "small" if rate < lowest else "large"
            yield (
                f"{key} = {rate:g} is {word} for {kind}, which usually takes {usual:g} "
                "(docs/optimizers.md)"
            )
    if traits.averages and config.lr_schedule.kind != "constant":
        yield (
            f"lr_schedule.kind = {config.lr_schedule.kind!r}: {kind} averages weights in place of "
            'a schedule, and is meant for "constant", with a warm-up if you like'
        )


def _sharding(config: RunConfig) -> Iterator[Problem]:
    kind, distributed = config.optimizer.kind, config.distributed
    traits = traits_of(kind)
    stage = distributed.zero_stage
    if not stage or distributed.engine == "local":
        return  # another rule says it
    if traits.bf16_only or (not traits.elementwise and _masters(config)):
        return  # another rule has a better hint
    if not traits.elementwise:
        yield Problem(
            f"{traits.why_whole}, and ZeRO-{stage} shows {kind} flat pieces of many: it would "
            "train otherwise without an error",
            KIND_KEY,
            hint='set distributed.zero_stage = 0 (or engine = "local" on one GPU), or use adamw',
        )
    elif stage == 3 and not traits.cuttable:
        yield Problem(
            "8-bit states cannot follow weights that ZeRO-3 shards",
            KIND_KEY,
            hint="use adamw, or zero_stage 0, 1 or 2",
        )


def _offload(config: RunConfig) -> Iterator[Problem]:
    kind, place = config.optimizer.kind, config.distributed.offload_optimizer
    traits = traits_of(kind)
    if kind == "deepspeed_cpu_adam" and place == "none":
        yield Problem(
            "it updates weights that wait in RAM, and nothing is offloaded",
            KIND_KEY,
            hint=f'use adamw, or set {OPTIMIZER_KEY} = "cpu" and zero_stage = 2',
        )
    if place == "none":
        return
    if not traits.on_cpu:
        yield Problem(
            "an offloaded optimizer steps on the CPU, and the 8-bit states of bitsandbytes are "
            "made for the GPU",
            KIND_KEY,
            hint='use adamw, or set distributed.offload_optimizer = "none"',
        )
    elif place == "nvme" and kind not in {"adamw", "deepspeed_cpu_adam"}:
        yield Problem(
            f"what {kind} keeps besides two moments cannot be moved to an SSD",
            KIND_KEY,
            hint=f'use adamw, or set {OPTIMIZER_KEY} = "cpu"',
        )


def _masters(config: RunConfig) -> bool:
    return config.adapter.kind == "none" and config.memory.weight_format == "bf16"


def _low_precision(config: RunConfig) -> Iterator[Problem]:
    kind = config.optimizer.kind
    if not traits_of(kind).bf16_only:
        return
    if config.adapter.kind != "none" or config.memory.weight_format != "bf16":
        what = "an adapter is" if config.adapter.kind != "none" else "these weights are"
        yield Problem(
            f"it trains weights that stay in bf16, and {what} not in bf16",
            KIND_KEY,
            hint='use adamw; or train the model itself: adapter.kind = "none", '
            'memory.weight_format = "bf16"',
        )
        return
    if config.distributed.engine != "local":
        yield Problem(
            "DeepSpeed trains bf16 weights through float32 copies, which this is to save",
            KIND_KEY,
            hint='set distributed.engine = "local" (one GPU), or use adamw',
        )
    if config.training.gradient_accumulation_steps > 1:
        yield Problem(
            "gradients of bf16 weights would be added up in bf16, which loses small ones",
            "training.gradient_accumulation_steps",
            hint="set it to 1 and a larger batch_size, or use adamw",
        )


def _rates(config: RunConfig) -> Iterator[Problem]:
    """Yield what of the adapter this optimizer's steps would make wrong."""
    kind, options = config.optimizer.kind, config.adapter.options("kind")
    if traits_of(kind).averages and options.get("scale_weight_norms") is not None:
        yield Problem(
            f"{kind} averages weights of which this would bound one copy only",
            "adapter.scale_weight_norms",
            hint="leave it out, or use another optimizer",
        )
    if traits_of(kind).one_rate and options.get("loraplus_lr_ratio") not in {None, 1}:
        yield Problem(
            f"{kind} has one step size for all weights: it would ignore this",
            "adapter.loraplus_lr_ratio",
            hint="leave it out, or use another optimizer",
        )
