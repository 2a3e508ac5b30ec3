"""Keys of musubi-tuner and Takenoko that mean something together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.domain.importing import values as v
from app.domain.importing.kinds import (
    CUSTOM,
    RELATIVE_STEPS,
    STEP_SIZE,
    has_option,
    put_argument,
    put_class_argument,
    put_optimizer,
    put_option,
    put_schedule,
)
from app.domain.importing.tables import Keys
from trainer.contract.catalog import PLUGIN_KINDS
from trainer.contract.variants import VARIANTS

EPOCHS_HINT = (
    "Menma counts steps here: an epoch has as many as `menma check` tells batches, divided by "
    "gradient_accumulation_steps"
)


def attention(keys: Keys) -> None:
    """Exactly one switch chooses how attention is computed."""
    names = {"sdpa": "sdpa", "flash_attn": "flash2", "flash3": "flash3", "xformers": "xformers"}
    chosen = [key for key in names if v.is_on(keys.get(key))]
    for key, name in names.items():
        if key in chosen[:1]:
            keys.put(key, "memory.attention", name)
        elif key in chosen:
            keys.lacks(key, f"{chosen[0]} is chosen, too; one counts")
        else:
            keys.same(key)
    if v.is_on(keys.get("sage_attn")):
        keys.lacks(
            "sage_attn", "it has no gradients; musubi-tuner refuses it for training, too",
            'memory.attention = "sage" is for `menma sample`',
        )  # fmt: skip
    if v.is_on(keys.get("split_attn")):
        keys.done("split_attn", "each clip of a batch attends to its own tokens in any case")


COMPILE = (
    "compile_mode",
    "compile_dynamic",
    "compile_fullgraph",
    "compile_cache_size_limit",
    "compile_backend",
    "dynamo_mode",
    "dynamo_fullgraph",
    "dynamo_dynamic",
)


def compiling(keys: Keys) -> None:
    """Two routes to torch.compile, by `compile` and by `dynamo_backend`."""
    backend = str(keys.get("dynamo_backend", "NO")).lower()
    if v.is_on(keys.get("compile")):
        keys.put("compile", "memory.compile_blocks", value=True)
    if backend not in {"no", "none", "", "false"}:
        keys.put(
            "dynamo_backend", "memory.compile_blocks", value=True,
            note="blocks are compiled one by one, by inductor",
        )  # fmt: skip
    if "compile_backend" in keys and keys.get("compile_backend") != "inductor":
        keys.lacks("compile_backend", "blocks are compiled by inductor only")
    for key in COMPILE:
        if keys.get(key) not in (None, "", "default", "inductor") and keys.get(key) is not False:
            keys.done(key, "Menma chooses this for its blocks")


def memory(keys: Keys) -> None:
    """Recomputation and swapped blocks; Menma swaps only where it recomputes."""
    swapped = keys.read("blocks_to_swap", v.whole, 0)
    checkpointing = keys.read("gradient_checkpointing", v.flag, default=False)
    if swapped and not checkpointing and keys.draft.knows("memory.blocks_to_swap"):
        why = "swapping saves less than the activations take, so Menma swaps only with it"
        keys.done("gradient_checkpointing", why)
        keys.draft.values["memory.gradient_checkpointing"] = True
    else:
        keys.put("gradient_checkpointing", "memory.gradient_checkpointing", checkpointing)
    if keys.read("gradient_checkpointing_cpu_offload", v.flag, default=False):
        keys.put("gradient_checkpointing_cpu_offload", "memory.offload_checkpoints", value=True)
    if swapped:
        keys.put("blocks_to_swap", "memory.blocks_to_swap", swapped)
    for key in ("block_swap_h2d_only", "use_pinned_memory_for_block_swap", "block_swap_ring_size"):
        if keys.get(key) not in (None, False):
            keys.done(
                key, "frozen blocks are only copied to the GPU, from pinned memory, two at a time"
            )


def precision(keys: Keys) -> None:
    """Three switches make one precision of the frozen weights."""
    base = keys.read("fp8_base", v.flag, default=False)
    scaled = keys.read("fp8_scaled", v.flag, default=False)
    word = str(keys.get("mixed_precision") or "no").lower()
    target = "memory.weight_format"
    if scaled:
        keys.put("fp8_scaled", target, "fp8_scaled")
        keys.done("fp8_base", "part of fp8_scaled", target)
    elif base:
        keys.put("fp8_base", target, "fp8")
    if word == "bf16":
        keys.same("mixed_precision", "Menma computes in bf16")
    elif word == "fp16":
        keys.done("mixed_precision", "Menma computes in bf16, which needs no loss scaling; weights "
                  "in fp16 are read, too")  # fmt: skip
    elif word in {"no", "none"}:
        keys.done(
            "mixed_precision",
            'Menma computes in bf16; memory.weight_format = "fp32" is full precision',
        )
    else:
        keys.lacks("mixed_precision", f"{word!r} is no precision that Menma has")


def logs(keys: Keys) -> None:
    """Trackers; a folder alone means TensorBoard there."""
    given = "log_with" in keys
    tools = str(keys.get("log_with") or ("tensorboard" if keys.get("logging_dir") else "")).lower()
    key = "log_with" if given else "logging_dir"
    if tools in {"tensorboard", "all"}:
        keys.put(key, "logging.tensorboard", value=True)
    if tools in {"wandb", "all"}:
        if tools == "all":
            keys.draft.values["logging.wandb"] = True
        else:
            keys.put(key, "logging.wandb", value=True)
    if keys.get("logging_dir"):
        keys.done("logging_dir", "logs stand in the run directory, <output.runs_dir>/<name>")


def optimizer(keys: Keys) -> None:
    """Optimizer, its arguments, and its learning rate."""
    takes_rate = put_optimizer(keys, "optimizer_type", str(keys.get("optimizer_type") or "AdamW"))
    refused = "optimizer_type" in keys.reported and keys.reported["optimizer_type"].is_lost
    for key in keys.below("optimizer_args"):
        if refused:
            keys.lacks(key, "an argument of the optimizer that Menma lacks")
        else:
            value = keys.read(key, v.literal)
            put_argument(keys, key, key.partition(".")[2], value)
    adafactor = keys.draft.chosen("optimizer.kind") == "adafactor"
    if adafactor and "optimizer_args.relative_step" not in keys:
        size = RELATIVE_STEPS["relative_step"]
        if keys.draft.chosen(STEP_SIZE) not in RELATIVE_STEPS.values():
            keys.put("optimizer_type: relative_step", STEP_SIZE, size)
    rate_default = keys.default("learning_rate", 2e-6)
    rate = keys.read("learning_rate", v.number, rate_default)
    if adafactor and keys.draft.chosen(STEP_SIZE) in RELATIVE_STEPS.values():
        keys.put("learning_rate", "optimizer.learning_rate", 1.0,
                 note="ignored there with a relative step, a factor of it here")  # fmt: skip
    elif takes_rate:
        keys.put("learning_rate", "optimizer.learning_rate", rate)
    else:
        keys.lacks("learning_rate", "a rate of the optimizer that Menma lacks")


def schedule(keys: Keys) -> None:
    """Course of the learning rate; shares of the run become steps."""
    name = str(keys.get("lr_scheduler") or "constant")
    if keys.get("lr_scheduler_type"):
        _schedule_class(keys, str(keys.get("lr_scheduler_type")))
        return
    has = put_schedule(keys, "lr_scheduler", name)
    _warmup(keys)
    _decay(keys)
    for key, (convert, default, option) in SCHEDULE_OPTIONS.items():
        value = keys.read(key, convert, SCHEDULE_DEFAULTS.get((name, key), default))
        if has_option(keys, "lr_schedule", "kind", "lr_schedule", option):
            if value is not None:
                keys.put(key, f"lr_schedule.{option}", value)
        elif value in (None, 0) or value == default or (has and key not in keys):
            keys.same(key, "its default, and without meaning for this schedule")
        else:
            keys.lacks(key, f"lr_schedule.kind = {_schedule(keys)!r} has no such option")
    if name == "warmup_stable_decay" and has:
        keys.put("lr_scheduler: decay_shape", "lr_schedule.decay_shape", "cosine")
    arguments = {key.partition(".")[2]: key for key in keys.below("lr_scheduler_args")}
    if name == "rex" and has and "rex_alpha" not in arguments:
        keys.put("rex_alpha", "lr_schedule.alpha", 0.1)
    for argument, key in arguments.items():
        value = keys.read(key, v.literal)
        put_option(keys, key, "lr_schedule", "kind", value, argument, argument.removeprefix("rex_"))


def _schedule_class(keys: Keys, name: str) -> None:
    """Write a schedule that is a class of torch or of another package; it counts alone there."""
    path = name if "." in name else f"torch.optim.lr_scheduler.{name}"
    keys.put("lr_scheduler_type", "lr_schedule.kind", CUSTOM, note=f"{path} itself")
    keys.draft.values["lr_schedule.class"] = path
    _warmup(keys)
    for key in keys.below("lr_scheduler_args"):
        argument = key.partition(".")[2]
        put_class_argument(keys, key, "lr_schedule", argument, keys.read(key, v.literal))
    for key in ("lr_scheduler", "lr_decay_steps", *SCHEDULE_OPTIONS):
        keys.done(key, "lr_scheduler_type is given, too: it decides")


SCHEDULE_OPTIONS: Mapping[str, tuple[Any, Any, str]] = {
    "lr_scheduler_num_cycles": (v.whole, 1, "num_cycles"),
    "lr_scheduler_power": (v.number, 1.0, "power"),
    "lr_scheduler_timescale": (v.whole, None, "timescale_steps"),
    "lr_scheduler_min_lr_ratio": (v.number, None, "min_lr_ratio"),
}
"""Option -> converter, default, name in Menma."""
SCHEDULE_DEFAULTS: Mapping[tuple[str, str], Any] = {
    ("rex", "lr_scheduler_min_lr_ratio"): 0.01,
    ("inverse_sqrt", "lr_scheduler_timescale"): 10_000,
}
"""Defaults that a schedule has of its own."""


def _schedule(keys: Keys) -> str:
    return str(keys.draft.chosen("lr_schedule.kind"))


def _share(raw: Any) -> tuple[float, bool] | None:
    """Return a number and whether it is a share of all steps (`0.1`, `10%`); None: it is none."""
    percent = isinstance(raw, str) and raw.strip().endswith("%")
    try:
        found = v.number(str(raw).rstrip("% "))
    except ValueError:
        return None
    if found is None or found < 0:
        return None
    return (found / 100, True) if percent else (found, 0 < found < 1)


def _warmup(keys: Keys) -> None:
    """Write steps, or a share of the run."""
    key = "lr_warmup_steps"
    if keys.get(key) is None:
        return
    found = _share(keys.get(key))
    if found is None:
        keys.lacks(key, "cannot be read: steps, a share below 1, or a percentage is expected")
    elif not found[1]:
        keys.put(key, "lr_schedule.warmup_steps", int(found[0]))
    else:
        keys.put(key, "lr_schedule.warmup_ratio", found[0], note="a share of the run")


def _decay(keys: Keys) -> None:
    """Write how long the last part of a schedule is, as a share of the run."""
    key, steps = "lr_decay_steps", keys.read("max_train_steps", v.positive, 1600)
    found = _share(keys.get(key) or 0)
    if found is None:
        keys.lacks(key, "cannot be read: steps, a share below 1, or a percentage is expected")
    elif not found[0]:
        keys.same(key, "off, as in Menma")
    elif not has_option(keys, "lr_schedule", "kind", "lr_schedule", "decay_ratio"):
        keys.lacks(key, f"lr_schedule.kind = {_schedule(keys)!r} has no such part")
    elif found[1]:
        keys.put(key, "lr_schedule.decay_ratio", found[0])
    elif keys.get("max_train_epochs"):
        keys.lacks(key, f"the length is given in epochs; {EPOCHS_HINT}",
                   "set lr_schedule.decay_ratio, a share of the run")  # fmt: skip
    else:
        ratio = min(found[0] / steps, 1.0)
        keys.put(key, "lr_schedule.decay_ratio", ratio, note=f"of {steps} steps")


def experts(keys: Keys) -> None:
    """Which model, which of its transformers, and which timesteps."""
    variant = str(keys.draft.chosen("model.variant"))
    low, high = keys.get("dit"), keys.get("dit_high_noise")
    known = VARIANTS.get(variant)
    boundary = keys.read("timestep_boundary", v.number)
    if boundary is not None and boundary > 1:
        boundary /= 1000
    if known is None or not known.experts:
        _transformer(keys, "dit", "model.transformer", low)
        keys.lacks("dit_high_noise", f"{variant} has one transformer")
        keys.lacks("timestep_boundary", f"{variant} has one transformer")
        _range(keys)
        return
    if high is not None:
        keys.draft.values["model.expert"] = "shared"
        keys.draft.notes.append(
            'one LoRA works in both experts, as musubi-tuner trains it; model.expert = "both" '
            "trains one for each, which ComfyUI takes as a pair"
        )
        _transformer(keys, "dit", "model.transformer", low)
        _transformer(keys, "dit_high_noise", "model.transformer_high_noise", high)
    else:
        expert = _expert(keys, known.expert_boundary, str(low or ""))
        keys.draft.values["model.expert"] = expert
        side = "model.transformer_high_noise" if expert == "high_noise" else "model.transformer"
        _transformer(keys, "dit", side, low)
    if boundary is not None:
        keys.put("timestep_boundary", "model.expert_boundary", boundary)
    _range(keys, whole=high is None)


def _transformer(keys: Keys, key: str, target: str, value: Any) -> None:
    if value is not None:
        path, note = keys.weights_of(value)
        keys.put(key, target, path, note=note)


def _expert(keys: Keys, boundary: float, name: str) -> str:
    """Return the expert that a run of one trains: by its timesteps, else by its file's name."""
    low = keys.read("min_timestep", v.number, 0.0)
    high = keys.read("max_timestep", v.number, 1000.0)
    if low > 0 or high < 1000:
        return "high_noise" if (low + high) / 2 >= 1000 * boundary else "low_noise"
    if "high" in name.lower().replace("\\", "/").rpartition("/")[2]:
        return "high_noise"
    if "low" not in name.lower():
        keys.draft.notes.append(
            "nothing says which expert this is: low_noise is taken; see model.expert"
        )
    return "low_noise"


def _range(keys: Keys, *, whole: bool = False) -> None:
    """Write the trained timesteps; `whole`: an expert of its own trains on all where none are."""
    for key, end in (("min_timestep", 0.0), ("max_timestep", 1000.0)):
        value = keys.read(key, v.number, end if whole else None)
        if value is not None:
            keys.put(key, f"objective.{key}", float(value))
    if keys.read("preserve_distribution_shape", v.flag, default=False):
        keys.put("preserve_distribution_shape", "objective.preserve_distribution_shape", value=True)


SAMPLERS: Mapping[str, tuple[tuple[str, ...], Mapping[str, tuple[str, ...]]]] = {
    "uniform": (("uniform",), {}),
    "sigmoid": (("sigmoid",), {"sigmoid_scale": ("sigmoid_scale",)}),
    "shift": (("shift",), {"discrete_flow_shift": ("flow_shift",),
                           "sigmoid_scale": ("sigmoid_scale",)}),
    "flux_shift": (("flux_shift",), {"sigmoid_scale": ("sigmoid_scale",)}),
    "qwen_shift": (("qwen_shift",), {"sigmoid_scale": ("sigmoid_scale",)}),
    "logsnr": (("logsnr",), {"logit_mean": ("logit_mean", "mean", "logsnr_mean"),
                             "logit_std": ("logit_std", "std", "logsnr_std")}),
    "qinglong_flux": (("qinglong_flux",), {"logit_mean": ("logit_mean", "logsnr_mean"),
                                           "logit_std": ("logit_std", "logsnr_std"),
                                           "sigmoid_scale": ("sigmoid_scale",)}),
    "qinglong_qwen": (("qinglong_qwen",), {"logit_mean": ("logit_mean", "logsnr_mean"),
                                           "logit_std": ("logit_std", "logsnr_std"),
                                           "sigmoid_scale": ("sigmoid_scale",)}),
    "logit_normal": (("logit_normal",), {"logit_mean": ("logit_mean",),
                                         "logit_std": ("logit_std",)}),
    "mode": (("mode",), {"mode_scale": ("mode_scale", "scale")}),
    "bell_shaped": (("bell", "bell_shaped"), {"bell_center": ("center", "bell_center"),
                                              "bell_std": ("std", "bell_std")}),
    "half_bell": (("half_bell",), {"bell_center": ("center", "bell_center"),
                                   "bell_std": ("std", "bell_std")}),
    "content": (("style",), {}),  # u³ there, the other one's formula in the paper and here
    "style": (("content",), {}),
    "enhanced_sigmoid": (("enhanced_sigmoid",), {"sigmoid_scale": ("sigmoid_scale",),
                                                 "sigmoid_bias": ("sigmoid_bias", "bias")}),
}  # fmt: skip
"""Timestep sampling -> its names in Menma, and its options -> their names in Menma."""
SAMPLER_DEFAULTS: Mapping[str, float] = {
    "discrete_flow_shift": 1.0, "sigmoid_scale": 1.0, "logit_mean": 0.0, "logit_std": 1.0,
    "mode_scale": 1.29, "bell_center": 0.5, "bell_std": 0.2, "sigmoid_bias": 0.0,
}  # fmt: skip


def timesteps(keys: Keys) -> None:
    """Distribution of the timesteps and weight of the loss."""
    name = str(keys.get("timestep_sampling") or keys.default("timestep_sampling", "sigma"))
    scheme = str(keys.get("weighting_scheme") or "none")
    key, note = "timestep_sampling", ""
    if name == "sigma":
        # Its density is the weighting scheme's; the flow shift has no effect there.
        name = scheme if scheme in {"logit_normal", "mode"} else "uniform"
        note = "sigma draws one of 1000 timesteps; Menma draws them continuously"
        keys.done("discrete_flow_shift", "without effect there with timestep_sampling sigma")
        if name != "uniform":
            keys.done("weighting_scheme", f"it chooses the density: {name}")
    names, options = SAMPLERS.get(name, ((name,), {}))
    kind = next((k for k in names if k in PLUGIN_KINDS["timestep_sampler"]), None)
    if kind is None:
        keys.lacks(key, f"Menma has no timestep sampler {name!r} yet; its own default is used",
                   "choose objective.timestep_sampler (docs/config.md)")  # fmt: skip
    else:
        if name in {"content", "style"}:
            note = f"its {name} has the formula of {kind} in the paper, and here"
        keys.put(key, "objective.timestep_sampler", kind, note=note)
    for option, default in SAMPLER_DEFAULTS.items():
        value = keys.read(option, v.number, keys.default(option, default))
        if kind is not None and option in options:
            put_option(keys, option, "objective", "timestep_sampler", value, *options[option])
        elif option in options:
            keys.lacks(option, f"an option of {name}, which Menma lacks")
        elif option in keys:
            keys.same(option, f"without meaning for timestep_sampling {name}")
    if kind is not None:
        _mixture(keys, name)
    _weighting(keys, scheme)
    buckets = keys.read("num_timestep_buckets", v.whole, 0)
    if buckets and buckets >= 2:
        keys.put("num_timestep_buckets", "objective.num_timestep_buckets", buckets)


def _mixture(keys: Keys, name: str) -> None:
    """Write the shares of a mixture where a trainer has its own."""
    slot = "timestep_sampler"
    for option, share in (keys.default(name) or {}).items():
        if has_option(keys, "objective", slot, slot, option):
            keys.put(f"{name}: {option}", f"objective.{option}", share)


def _weighting(keys: Keys, scheme: str) -> None:
    kinds = {"sigma_sqrt": "sigma_sqrt", "cosmap": "cosmap"}
    if scheme in kinds:
        note = "bounded here at small sigma: sigma_floor" if scheme == "sigma_sqrt" else ""
        keys.put("weighting_scheme", "objective.weighting", kinds[scheme], note=note)
    elif scheme in {"mode", "logit_normal"}:
        keys.same("weighting_scheme", "without effect but with timestep_sampling sigma")
    elif scheme == "none":
        keys.same("weighting_scheme", "every timestep counts the same, as in Menma")
    else:
        keys.put("weighting_scheme", "objective.weighting", scheme)


def sampling(keys: Keys) -> None:
    """Samples on the way: how often, and of what."""
    if epoch_interval(keys, "sample_every_n_epochs", "sampling"):
        keys.done("sample_every_n_steps", "sample_every_n_epochs is given, too: it decides there")
    elif steps := keys.read("sample_every_n_steps", v.positive):
        keys.put("sample_every_n_steps", "sampling.every_steps", steps)
    if keys.read("sample_at_first", v.flag, default=False):
        keys.put("sample_at_first", "sampling.at_start", value=True)


def epoch_interval(keys: Keys, key: str, section: str, note: str = "") -> int | None:
    """Carry over an interval in epochs; return it."""
    count: int | None = keys.read(key, v.positive)
    if count:
        keys.put(key, f"{section}.every_epochs", count, note=note)
    return count


def saving(keys: Keys) -> None:
    """Files on the way and the state to resume from."""
    every = keys.read("save_every_n_steps", v.positive, keys.default("save_every_n_steps"))
    state = keys.read("save_state", v.flag, keys.default("save_state", fallback=False))
    if every:
        keys.put("save_every_n_steps", "output.every_steps", every)
    count = epoch_interval(keys, "save_every_n_epochs", "output")
    if state and every:
        keys.put("save_state", "checkpoint.every_steps", every)
    elif state and count:
        keys.put("save_state", "checkpoint.every_epochs", count, note="those of checkpoint."
                 "every_steps come beside them")  # fmt: skip
    elif state:
        keys.done("save_state", "checkpoints are written by steps: checkpoint.every_steps")
    if state and every and count:
        keys.draft.values["checkpoint.every_epochs"] = count
    if v.is_on(keys.get("save_state_on_train_end")):
        keys.done("save_state_on_train_end", "the last checkpoint is always written at the end")
    _kept(keys, every)


def _kept(keys: Keys, every: int | None) -> None:
    window = keys.read("save_last_n_steps_state", v.positive)
    count = keys.read("save_last_n_epochs_state", v.positive)
    if window and every:
        keys.put("save_last_n_steps_state", "checkpoint.keep_last", window // every + 1,
                 note=f"a window of {window} steps holds so many")  # fmt: skip
    elif window:
        keys.lacks("save_last_n_steps_state", "a window in steps, but no steps between states",
                   "set checkpoint.keep_last")  # fmt: skip
    if count:
        keys.put("save_last_n_epochs_state", "checkpoint.keep_last", count,
                 note="checkpoints are counted, not epochs")  # fmt: skip
    _kept_outputs(keys, every)


def _kept_outputs(keys: Keys, every: int | None) -> None:
    """Files are counted here; there, too, but for a window in steps."""
    window = keys.read("save_last_n_steps", v.positive)
    if window and every:
        keys.put("save_last_n_steps", "output.keep_last", window // every + 1,
                 note=f"a window of {window} steps holds so many")  # fmt: skip
    elif window:
        keys.lacks("save_last_n_steps", "a window in steps, but no steps between files",
                   "set output.keep_last")  # fmt: skip
    count = keys.read("save_last_n_epochs", v.positive)
    if count:
        keys.put("save_last_n_epochs", "output.keep_last", count)
