"""Keys of SimpleTuner that mean something together."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from app.domain.importing import values as v
from app.domain.importing.kinds import (
    has_option,
    put_argument,
    put_optimizer,
    put_option,
    put_schedule,
)
from app.domain.importing.musubi import v_name
from app.domain.importing.musubi_groups import epoch_interval
from app.domain.importing.tables import Keys
from trainer.contract.catalog import PLUGIN_KINDS


def adapter(keys: Keys) -> None:
    """Kind and size of what is trained."""
    full = str(keys.get("model_type") or "lora").lower() == "full"
    lycoris = str(keys.get("lora_type") or "standard").lower() == "lycoris"
    config = {key.partition(".")[2]: keys.get(key) for key in keys.below("lycoris")}
    config = config if lycoris and not full else {}
    kind = "none" if full else str(config.get("algo", "lora")).lower()
    kind = {"locon": "lora"}.get(kind, kind)
    if not full and v.is_on(keys.get("use_dora")):
        kind = "dora"
    if not full and str(keys.get("peft_lora_mode")) == "singlora":
        kind = "singlora"
    key = "model_type" if full or not lycoris else "lora_type"
    if kind not in PLUGIN_KINDS["adapter"]:
        keys.lacks("lycoris_config", f"Menma has no adapter {kind!r}", "choose adapter.kind")
        kind = "lora"
    keys.put(key, "adapter.kind", kind)
    for other in ("model_type", "lora_type", "use_dora", "peft_lora_mode"):
        keys.done(other, "adapter.kind says it", "adapter.kind")
    if full:
        return
    rank = keys.read("lora_rank", v.positive, v.positive_or(config.get("linear_dim"), 16))
    put_option(keys, "lora_rank", "adapter", "kind", min(int(rank), 4096), "rank")
    alpha = keys.read("lora_alpha", v.number, v.positive_or(config.get("linear_alpha"), 0))
    if alpha:
        put_option(keys, "lora_alpha", "adapter", "kind", float(alpha), "alpha")
        if "lora_alpha" not in keys:
            keys.draft.values.setdefault("adapter.alpha", float(alpha))
    dropout = keys.read("lora_dropout", v.number, 0.1)
    if kind in {"lora", "tlora", "ggpo"}:
        put_option(keys, "lora_dropout", "adapter", "kind", dropout, "dropout")
    else:
        keys.lacks("lora_dropout", f"adapter {kind!r} has no dropout")
    _lycoris(keys, kind)
    _starts(keys, kind)


def _starts(keys: Keys, kind: str) -> None:
    start = keys.read("init_lora", v.text)
    if start:
        put_option(keys, "init_lora", "adapter", "kind", keys.file_of(start)[0], "init_from")
    init = str(keys.get("lora_init_type") or "default")
    if init.startswith("pissa"):
        put_option(keys, "lora_init_type", "adapter", "kind", "pissa", "init")
    elif init in {"default", "true", "True"}:
        keys.same("lora_init_type", "as in Menma")
    else:
        keys.lacks("lora_init_type", f"Menma does not begin with {init}", "adapter.init")
    steps = keys.read("singlora_ramp_up_steps", v.whole)
    if steps is not None and kind == "singlora":
        put_option(keys, "singlora_ramp_up_steps", "adapter", "kind", steps, "ramp_steps")


def _lycoris(keys: Keys, kind: str) -> None:
    """Say what became of LyCORIS' own keys; kind, rank and alpha are written by now."""
    keys.done("lycoris_config", "its keys are listed here" if keys.below("lycoris") else
              "it could not be read, so its kind is not known")  # fmt: skip
    taken = {"algo": "kind", "linear_dim": "rank", "linear_alpha": "alpha"}
    for key in keys.below("lycoris"):
        name = key.partition(".")[2]
        if name in taken:
            keys.done(key, "", f"adapter.{taken[name]}")
        elif name == "factor" and (factor := keys.read(key, v.whole, -1)) >= 2:
            put_option(keys, key, "adapter", "kind", factor, "factor")
        elif name == "multiplier" and keys.get(key) in (1, 1.0):
            keys.same(key, "as in Menma")
        elif name.startswith("apply_preset"):
            keys.lacks(key, "the linear layers of the blocks are trained",
                       "adapter.targets, include and exclude")  # fmt: skip
        elif keys.get(key) in (None, False, 0, 0.0, -1):
            keys.same(key)
        else:
            put_option(keys, key, "adapter", "kind", keys.get(key), name)


def optimizer(keys: Keys) -> None:
    """Optimizer, its options from three places, and its rate."""
    name = str(keys.get("optimizer") or "adamw_bf16").partition("+")[0]
    takes_rate = put_optimizer(keys, "optimizer", name)
    refused = "optimizer" in keys.reported and keys.reported["optimizer"].is_lost
    rate = keys.read("learning_rate", v.number, 4e-7)
    if takes_rate:
        keys.put("learning_rate", "optimizer.learning_rate", rate)
    else:
        keys.lacks("learning_rate", "a rate of the optimizer that Menma lacks")
    if has_option(keys, "optimizer", "kind", "optimizer", "rounding"):
        keys.draft.values["optimizer.rounding"] = "stochastic"  # as its AdamW in bf16 rounds
    _betas(keys, refused=refused)
    for key, option, default in (("adam_weight_decay", "weight_decay", 0.01),
                                 ("adam_epsilon", "eps", 1e-8)):  # fmt: skip
        value = keys.read(key, v.number, default)
        if key in keys and refused:
            keys.lacks(key, "an option of the optimizer that Menma lacks")
        elif key in keys:
            put_argument(keys, key, option, value)
    for key in keys.below("optimizer_config"):
        if refused:
            keys.lacks(key, "an option of the optimizer that Menma lacks")
        else:
            put_argument(keys, key, key.partition(".")[2], keys.read(key, v.literal))
    norm = keys.read("max_grad_norm", v.number, 2.0)
    by_value = str(keys.get("grad_clip_method") or "value") == "value"
    if by_value:
        keys.put("max_grad_norm", "optimizer.max_grad_value", norm)
        keys.draft.values["optimizer.max_grad_norm"] = 0.0
        keys.done("grad_clip_method", "each value is clipped", "optimizer.max_grad_value")
    else:
        keys.put("max_grad_norm", "optimizer.max_grad_norm", norm)
        keys.same("grad_clip_method", "as in Menma")


def _betas(keys: Keys, *, refused: bool) -> None:
    first = keys.read("optimizer_beta1", v.number, keys.read("adam_beta1", v.number, 0.9))
    second = keys.read("optimizer_beta2", v.number, keys.read("adam_beta2", v.number, 0.999))
    names = [k for k in ("optimizer_beta1", "optimizer_beta2", "adam_beta1", "adam_beta2")
             if k in keys]  # fmt: skip
    for index, key in enumerate(names):
        if refused:
            keys.lacks(key, "an option of the optimizer that Menma lacks")
        elif index == 0:
            put_argument(keys, key, "betas", [first, second])
        else:
            keys.done(key, "in optimizer.betas", "optimizer.betas")


def schedule(keys: Keys) -> None:
    """Course of the learning rate; `sine` and 500 steps of warm-up are the defaults there."""
    name = str(keys.get("lr_scheduler") or "sine").lower()
    has = put_schedule(keys, "lr_scheduler", name)
    if not has and "lr_scheduler" not in keys:
        keys.draft.notes.append("SimpleTuner's default schedule is `sine`, which Menma has not; "
                                "the learning rate is constant")  # fmt: skip
    warmup = keys.read("lr_warmup_steps", v.whole, 500 if "lr_warmup_steps" not in keys else 0)
    keys.put("lr_warmup_steps", "lr_schedule.warmup_steps", warmup)
    for key, option, convert, default in (("lr_num_cycles", "num_cycles", v.whole, 1),
                                          ("lr_power", "power", v.number, 0.8)):  # fmt: skip
        if has_option(keys, "lr_schedule", "kind", "lr_schedule", option):
            keys.put(key, f"lr_schedule.{option}", keys.read(key, convert, default))
        else:
            keys.same(key, f"without meaning for {name}")
    end, rate = keys.read("lr_end", v.number), keys.draft.chosen("optimizer.learning_rate")
    if end is not None and name in {"polynomial", "cosine", "linear"} and has:
        put_option(keys, "lr_end", "lr_schedule", "kind", end / rate, "min_lr_ratio")
    else:
        keys.same("lr_end", f"without meaning for {name}")
    if v.is_on(keys.get("lr_scale")):
        keys.lacks("lr_scale", "the rate is taken as it is", "multiply optimizer.learning_rate")


def length(keys: Keys) -> None:
    """Steps where they are given, else epochs."""
    steps = keys.read("max_train_steps", v.positive)
    epochs = keys.read("num_train_epochs", v.whole, 1)
    if steps:
        keys.put("max_train_steps", "training.max_steps", steps)
        keys.done("num_train_epochs", "max_train_steps is given, too: it decides")
    elif epochs:
        keys.put("num_train_epochs", "training.epochs", epochs)


def timesteps(keys: Keys) -> None:
    """Sigmoid of a normal, shifted; shift 0 is none."""
    shift = keys.read("flow_schedule_shift", v.number, 3.0)
    auto = v.is_on(keys.get("flow_schedule_auto_shift"))
    uniform = v.is_on(keys.get("flow_use_uniform_schedule"))
    beta = v.is_on(keys.get("flow_use_beta_schedule"))
    kinds = PLUGIN_KINDS["timestep_sampler"]
    if uniform:
        keys.put("flow_use_uniform_schedule", "objective.timestep_sampler", "uniform")
        keys.lacks("flow_schedule_shift", "timestep_sampler uniform has no shift")
    elif auto and "flux_shift" in kinds:
        keys.put("flow_schedule_auto_shift", "objective.timestep_sampler", "flux_shift")
        keys.done("flow_schedule_shift", "flow_schedule_auto_shift is on")
    else:
        keys.draft.values["objective.timestep_sampler"] = "shift"
        if auto:
            keys.lacks(
                "flow_schedule_auto_shift",
                "Menma has no shift by resolution yet",
                "832x480 has a shift of 2.06, 1280x720 of 2.90: set objective.flow_shift",
            )
        keys.put("flow_schedule_shift", "objective.flow_shift", float(shift or 1.0),
                 note="" if shift else "0 there is no shift, which is 1")  # fmt: skip
    if beta:
        keys.lacks("flow_use_beta_schedule", "Menma has no beta density",
                   "a sigmoid with sigmoid_scale is near to it")  # fmt: skip
    scale = keys.read("flow_sigmoid_scale", v.number, 1.0)
    if "flow_sigmoid_scale" in keys and not uniform:
        put_option(keys, "flow_sigmoid_scale", "objective", "timestep_sampler", scale,
                   "sigmoid_scale")  # fmt: skip
    if "model.expert" in keys.draft.values:
        keys.draft.notes.append("timesteps are those on the expert's side of the boundary")


def losses(keys: Keys) -> None:
    """Pointwise loss."""
    name = str(keys.get("loss_type") or "l2").lower()
    ours = {"l2": "mse", "smooth_l1": "huber"}.get(name, name)
    has = keys.put("loss_type", "objective.loss", ours, hint="choose objective.loss")
    for key, option, default in (
        ("huber_c", "huber_delta", 0.1),
        ("huber_schedule", "huber_schedule", "snr"),
    ):
        if has and has_option(keys, "objective", "loss", "loss", option):
            convert = v.number if key == "huber_c" else v.text
            keys.put(key, f"objective.{option}", keys.read(key, convert, default))
        else:
            keys.same(key, f"without meaning for {name}")


def ema(keys: Keys) -> None:
    """A running mean of the weights."""
    names = [key for key in keys.values if key == "use_ema" or key.startswith("ema_")]
    if not v.is_on(keys.get("use_ema")):
        for key in names:
            keys.same(key, "use_ema is off, as in Menma")
        return
    keys.put("ema_decay", "ema.decay", keys.read("ema_decay", v.number, 0.995))
    keys.done("use_ema", "ema.decay above 0", "ema.decay")
    every = keys.read("ema_update_interval", v.positive, 1)
    keys.put("ema_update_interval", "ema.every_steps", every)
    on_gpu = str(keys.get("ema_device") or "cpu").lower() == "accelerator"
    keys.put("ema_device", "ema.device", "train" if on_gpu else "cpu")
    mode = str(keys.get("ema_validation") or "comparison")
    if mode == "none":
        keys.put("ema_validation", "ema.use_for_samples", value=False)
    elif mode == "comparison":
        keys.done("ema_validation", "samples are made with the mean, not twice")
    else:
        keys.same("ema_validation", "as in Menma")
    for key in ("ema_cpu_only", "ema_foreach_disable"):
        keys.done(key, "Menma chooses this")


def logs(keys: Keys) -> None:
    """Trackers; Weights & Biases is the default there."""
    tools = set(v.words(str(keys.get("report_to") or "").lower()))
    tools = {"tensorboard", "wandb"} if "all" in tools else tools
    if "tensorboard" in tools:
        keys.put("report_to", "logging.tensorboard", value=True)
    if "wandb" in tools:
        keys.put("report_to", "logging.wandb", value=True)
        keys.draft.values["logging.wandb"] = True
    for tool in sorted(tools - {"tensorboard", "wandb", "none"}):
        keys.lacks("report_to", f"Menma does not log to {tool}")


def noise(keys: Keys) -> None:
    """An offset of the noise, which stays of variance 1 here."""
    if not v.is_on(keys.get("offset_noise")):
        for key in ("offset_noise", "noise_offset", "noise_offset_probability"):
            keys.same(key, "offset_noise is off")
        return
    strength = keys.read("noise_offset", v.number, 0.1)
    keys.draft.values["techniques"] = [{"name": "noise_offset", "strength": strength}]
    note = "[[techniques]] noise_offset, of variance 1; each item has it, there a share of them"
    keys.done("offset_noise", note, "techniques")
    keys.done("noise_offset", "its strength", "techniques")
    keys.lacks("noise_offset_probability", "every item has the offset", "lower its strength")


def samples(keys: Keys) -> None:
    """Validation images there are samples here."""
    base: dict[str, Any] = {
        "num_frames": keys.read("validation_num_video_frames", v.whole),
        "num_steps": keys.read("validation_num_inference_steps", v.whole),
        "guidance_scale": keys.read("validation_guidance", v.number),
        "seed": keys.read("validation_seed", v.whole),
        "negative_prompt": keys.read("validation_negative_prompt", v.text),
    }
    names = ("validation_num_video_frames", "validation_num_inference_steps",
             "validation_guidance", "validation_seed", "validation_negative_prompt")  # fmt: skip
    for key, (field, value) in zip(names, base.items(), strict=True):
        if value is not None and field == "num_frames":
            whole = (value - 1) // 4 * 4 + 1
            keys.put(key, "sampling.num_frames", whole, note="" if whole == value else "4n + 1")
        elif value is not None:
            keys.put(key, f"sampling.{field}", value)
    _sample_size(keys)
    if v.is_on(keys.get("validation_disable")):
        keys.done("validation_disable", "no samples are made")
        for key in ("validation_step_interval", "validation_steps", "validation_epoch_interval"):
            keys.same(key, "validation_disable is on")
        return
    prompts = _prompts(keys)
    for index, prompt in enumerate(prompts):
        keys.draft.values[f"sampling.prompts[{index}].prompt"] = prompt
    _sample_intervals(keys, bool(prompts))
    if v.is_on(keys.get("validation_on_startup")) and prompts:
        keys.put("validation_on_startup", "sampling.at_start", value=True)


def _sample_intervals(keys: Keys, has_prompts: bool) -> None:
    steps = next((k for k in ("validation_step_interval", "validation_steps") if k in keys), "")
    for key, unit in ((steps, "steps"), ("validation_epoch_interval", "epochs")):
        count = keys.read(key, v.positive) if key else None
        if count and has_prompts:
            keys.put(key, f"sampling.every_{unit}", count)
        elif count:
            keys.lacks(key, "there is no prompt", "add [[sampling.prompts]]")


def _sample_size(keys: Keys) -> None:
    raw = str(keys.get("validation_resolution") or "")
    if not raw:
        return
    first = raw.partition(",")[0].strip()
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", first)
    if match is None:
        keys.lacks("validation_resolution", "a size such as 832x480 is expected")
        return
    width, height = int(match[1]), int(match[2] or match[1])
    keys.put("validation_resolution", "sampling.width", width // 16 * 16,
             note="the first of them" if "," in raw else "width and height")  # fmt: skip
    keys.draft.values["sampling.height"] = height // 16 * 16


def _prompts(keys: Keys) -> list[str]:
    found = []
    if prompt := keys.read("validation_prompt", v.text):
        found.append(prompt)
        keys.done("validation_prompt", "a prompt of [[sampling.prompts]]",
                  "sampling.prompts[0].prompt")  # fmt: skip
    name = keys.read("user_prompt_library", v.text)
    if name:
        path = Path(keys.file_of(name)[0])
        try:
            library = json.loads(path.read_text("utf-8"))
            texts = [str(text) for text in library.values() if isinstance(text, str)]
        except (OSError, ValueError, AttributeError):
            keys.lacks("user_prompt_library", "it could not be read", "add [[sampling.prompts]]")
        else:
            keys.done("user_prompt_library", f"{len(texts)} prompts of [[sampling.prompts]]",
                      f"sampling.prompts[{len(found)}].prompt" if texts else "")  # fmt: skip
            found += texts
    return found


def saving(keys: Keys) -> None:
    """Checkpoints there are LoRA files and state at once."""
    key = next((k for k in ("checkpoint_step_interval", "checkpointing_steps") if k in keys),
               "checkpointing_steps")  # fmt: skip
    steps = keys.read(key, v.positive, 500)
    keys.put(key, "checkpoint.every_steps", steps)
    keys.draft.values["output.every_steps"] = steps
    for other in ("checkpoint_step_interval", "checkpointing_steps"):
        keys.done(other, "another name of it", "checkpoint.every_steps")
    kept = keys.read("checkpoints_total_limit", v.positive)
    if kept:
        keys.put("checkpoints_total_limit", "checkpoint.keep_last", kept)
    count = epoch_interval(keys, "checkpoint_epoch_interval", "checkpoint")
    if count:
        keys.draft.values["output.every_epochs"] = count
    if keys.get("eval_epoch_interval"):
        keys.lacks("eval_epoch_interval", "validation needs clips",
                   "set validation.split = 0.1 and validation.every_epochs")  # fmt: skip


def names(keys: Keys) -> None:
    """Name and folder of the run."""
    folder = Path(str(keys.get("output_dir") or "simpletuner-results"))
    keys.draft.values["name"] = v_name(folder.name)
    if "output_dir" in keys:
        keys.put("output_dir", "output.runs_dir", str(folder.parent),
                 note="the run writes into <output.runs_dir>/<name>")  # fmt: skip
    layout = str(keys.get("lora_format") or "diffusers").lower()
    keys.put("lora_format", "output.layout", "comfy" if layout == "comfyui" else "peft")
