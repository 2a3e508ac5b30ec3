"""Keys of SimpleTuner that mean something together."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from app.domain.importing import values as v
from app.domain.importing.kinds import put_argument, put_optimizer, put_option, put_schedule
from app.domain.importing.musubi import v_name
from app.domain.importing.musubi_groups import EPOCHS_HINT
from app.domain.importing.tables import Keys
from trainer.contract.catalog import PLUGIN_KINDS
from trainer.contract.variants import VARIANTS

FLAVOURS: Mapping[str, tuple[str, str]] = {
    "t2v-480p-1.3b-2.1": ("wan2.1-t2v-1.3b", ""),
    "t2v-480p-14b-2.1": ("wan2.1-t2v-14b", ""),
    "t2v-720p-14b-2.1": ("wan2.1-t2v-14b", ""),
    "i2v-480p-14b-2.1": ("wan2.1-i2v-14b", ""),
    "i2v-720p-14b-2.1": ("wan2.1-i2v-14b", ""),
    "t2v-14b-2.2-high": ("wan2.2-t2v-a14b", "high_noise"),
    "t2v-14b-2.2-low": ("wan2.2-t2v-a14b", "low_noise"),
    "i2v-14b-2.2-high": ("wan2.2-i2v-a14b", "high_noise"),
    "i2v-14b-2.2-low": ("wan2.2-i2v-a14b", "low_noise"),
    "t2v-5b-2.2": ("wan2.2-ti2v-5b", ""),
    "ti2v-5b-2.2": ("wan2.2-ti2v-5b", ""),
}
"""`model_flavour` -> variant and expert."""
PATHS = ("pretrained_model_name_or_path", "pretrained_transformer_model_name_or_path",
          "pretrained_vae_model_name_or_path", "pretrained_t5_model_name_or_path")  # fmt: skip
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def model(keys: Keys) -> None:
    """Variant, expert and weight files; what is a repository's name is one of the hub."""
    family = str(keys.get("model_family") or "wan").lower()
    if family not in {"wan", "wan_s2v"}:
        keys.lacks("model_family", f"Menma trains Wan, not {family}")
    else:
        keys.done("model_family", "model.variant says which Wan")
    variant, expert = _variant(keys)
    if variant:
        keys.put("model_flavour", "model.variant", variant)
        keys.draft.values["model.variant"] = variant
    else:
        keys.lacks("model_flavour", "Menma knows no such Wan", "set model.variant")
        keys.draft.notes.append("nothing says which Wan it is: set model.variant")
    if expert:
        keys.draft.values["model.expert"] = expert
    side = "model.transformer_high_noise" if expert == "high_noise" else "model.transformer"
    _weights(keys, side)
    if v.is_on(keys.get("wan_force_2_1_time_embedding")):
        keys.done("wan_force_2_1_time_embedding", "one vector a sample is used wherever it gives "
                  "the same")  # fmt: skip


def _variant(keys: Keys) -> tuple[str, str]:
    flavour = str(keys.get("model_flavour") or "").lower()
    if flavour in FLAVOURS:
        return FLAVOURS[flavour]
    name = str(keys.get("pretrained_model_name_or_path") or "").lower()
    for pattern, found in ((r"2\.2.*i2v", "wan2.2-i2v-a14b"), (r"2\.2.*5b", "wan2.2-ti2v-5b"),
                           (r"2\.2", "wan2.2-t2v-a14b"), (r"i2v", "wan2.1-i2v-14b"),
                           (r"1\.3b", "wan2.1-t2v-1.3b"), (r"14b", "wan2.1-t2v-14b")):  # fmt: skip
        if re.search(pattern, name):
            expert = "high_noise" if VARIANTS[found].experts else ""
            return found, expert
    return ("", "") if flavour or name else ("wan2.1-t2v-1.3b", "")


def _weights(keys: Keys, side: str) -> None:
    base = keys.get("pretrained_model_name_or_path")
    parts = {
        "pretrained_transformer_model_name_or_path": (side, "transformer"),
        "pretrained_vae_model_name_or_path": ("model.vae", "vae"),
        "pretrained_t5_model_name_or_path": ("model.text_encoder", "text_encoder"),
    }
    for key, (target, part) in parts.items():
        named = keys.get(key) or base
        if not isinstance(named, str) or not named:
            continue
        path, note = _folder(keys, named)
        if not path.endswith((".safetensors", ".pth")):
            path = f"{path}/{_subfolder(keys, part)}"
        if keys.get(key):
            keys.put(key, target, path, note=note or "the part of it that is meant")
        else:
            keys.draft.values[target] = path
    if isinstance(base, str) and base:
        path, note = _folder(keys, base)
        if not path.endswith((".safetensors", ".pth")):
            keys.draft.values["model.tokenizer"] = f"{path}/tokenizer"
            if _needs_image_encoder(keys):
                keys.draft.values["model.image_encoder"] = f"{path}/image_encoder"
        keys.done(PATHS[0], note or "its folders are named one by one", side)


def _needs_image_encoder(keys: Keys) -> bool:
    known = VARIANTS.get(str(keys.draft.chosen("model.variant")))
    return known is not None and known.transformer.image_dim is not None


def _subfolder(keys: Keys, part: str) -> str:
    # diffusers keeps the high-noise expert of Wan 2.2 in `transformer`, the other in `_2`.
    low = keys.draft.values.get("model.expert") == "low_noise"
    return "transformer_2" if low and part == "transformer" else part


def _folder(keys: Keys, name: str) -> tuple[str, str]:
    if _REPOSITORY.fullmatch(name) and not Path(name).exists():
        return f"hf:{name}", "`menma fetch` downloads it"
    return keys.weights_of(name)


def precision(keys: Keys) -> None:
    """Precision of the frozen weights."""
    word = str(keys.get("base_model_precision") or "no_change").lower()
    if word in {"no_change", "bf16", "none"}:
        keys.same("base_model_precision", "bf16, as in Menma")
    elif "fp8" in word:
        keys.put("base_model_precision", "memory.weight_format", "fp8_scaled",
                 note="fp8 with scales, of the blocks' linear layers")  # fmt: skip
    elif "int8" in word:
        keys.put("base_model_precision", "memory.weight_format", "fp8_scaled",
                 note="Menma has no int8; fp8 with scales is of the same size")  # fmt: skip
    else:
        keys.lacks("base_model_precision", f"Menma has no {word}",
                   'memory.weight_format = "fp8_scaled" is half of bf16')  # fmt: skip
    mixed = str(keys.get("mixed_precision") or "bf16").lower()
    if mixed == "bf16":
        keys.same("mixed_precision", "Menma computes in bf16")
    else:
        keys.done("mixed_precision", "Menma computes in bf16")


def memory(keys: Keys) -> None:
    """Recomputation and group offload, which is block swap here."""
    on = keys.read("gradient_checkpointing", v.flag, default=False)
    every = keys.read("gradient_checkpointing_interval", v.whole, 1)
    offload = v.is_on(keys.get("enable_group_offload"))
    value: Any = every if on and every and every >= 2 else on or offload
    keys.put("gradient_checkpointing", "memory.gradient_checkpointing", value)
    if on and every and every >= 2:
        keys.done("gradient_checkpointing_interval", "in gradient_checkpointing",
                  "memory.gradient_checkpointing")  # fmt: skip
    elif every == 1:
        keys.same("gradient_checkpointing_interval", "each block, as in Menma")
    if offload:
        keys.put(
            "enable_group_offload",
            "memory.blocks_to_swap",
            "auto",
            note="blocks wait in RAM and are copied one ahead; `auto`: as few as fit",
        )
    for key in keys.values:
        if key.startswith("group_offload_"):
            keys.done(key, "Menma swaps single blocks, with a stream of its own")
    if v.is_on(keys.get("enable_chunked_feed_forward")):
        chunks = keys.read("feed_forward_chunk_size", v.positive, 2)
        keys.put("enable_chunked_feed_forward", "memory.feed_forward_chunks", max(chunks, 2))
        keys.done("feed_forward_chunk_size", "the number of parts", "memory.feed_forward_chunks")


def attention(keys: Keys) -> None:
    """How attention is computed."""
    word = str(keys.get("attention_mechanism") or "diffusers").lower()
    names = {"diffusers": "sdpa", "xformers": "xformers", "flash-attn": "flash2",
             "flash-attn-2": "flash2", "flash-attn-3": "flash3", "flash-attn-3-varlen": "flash3",
             "flex": "flex", "cudnn": "sdpa"}  # fmt: skip
    if word in names:
        keys.put("attention_mechanism", "memory.attention", names[word])
    elif word.startswith("native"):
        keys.done("attention_mechanism", "torch picks its kernel")
    else:
        keys.lacks("attention_mechanism", f"{word} is not for training",
                   'memory.attention = "sage" is for `menma sample`')  # fmt: skip


def adapter(keys: Keys) -> None:
    """Kind and size of what is trained."""
    full = str(keys.get("model_type") or "lora").lower() == "full"
    lycoris = str(keys.get("lora_type") or "standard").lower() == "lycoris"
    config = _lycoris(keys) if lycoris and not full else {}
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
    rank = keys.read("lora_rank", v.positive, config.get("linear_dim") or 16)
    rank = min(int(rank), 4096)
    put_option(keys, "lora_rank", "adapter", "kind", rank, "rank")
    alpha = keys.read("lora_alpha", v.number, config.get("linear_alpha"))
    if alpha:
        put_option(keys, "lora_alpha", "adapter", "kind", float(alpha), "alpha")
        if "lora_alpha" not in keys:
            keys.draft.values.setdefault("adapter.alpha", float(alpha))
    dropout = keys.read("lora_dropout", v.number, 0.1)
    if kind in {"lora", "tlora", "ggpo"}:
        put_option(keys, "lora_dropout", "adapter", "kind", dropout, "dropout")
    else:
        keys.lacks("lora_dropout", f"adapter {kind!r} has no dropout")
    if config.get("factor") and kind == "lokr" and int(config["factor"]) >= 2:
        keys.draft.values["adapter.factor"] = int(config["factor"])
    if lycoris:
        keys.done("lycoris_config", "kind, rank, alpha and factor are taken from it"
                  if config else "it could not be read", "adapter.kind")  # fmt: skip
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


def _lycoris(keys: Keys) -> dict[str, Any]:
    """Return LyCORIS' own config, {} if it cannot be read."""
    name = str(keys.get("lycoris_config") or "config/lycoris_config.json")
    for folder in (Path(), *keys.folders, *(f.parent for f in keys.folders)):
        try:
            content = json.loads((folder / name).read_text("utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(content, dict):
            return {k: value for k, value in content.items() if not isinstance(value, dict | list)}
    return {}


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
    target = keys.draft.first_known(("optimizer.max_grad_value", "optimizer.clip_value"))
    if by_value and target is not None:
        keys.put("max_grad_norm", target, norm)
        keys.done("grad_clip_method", "each value is clipped", target)
    elif by_value:
        keys.put("max_grad_norm", "optimizer.max_grad_norm", norm,
                 note="the norm over all gradients is bounded, not each value")  # fmt: skip
        keys.lacks("grad_clip_method", "Menma clips by the norm")
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
    for key, option, convert in (("lr_num_cycles", "num_cycles", v.whole),
                                 ("lr_power", "power", v.number)):  # fmt: skip
        if key not in keys:
            continue
        if name in {"cosine_with_restarts", "polynomial"} and has:
            put_option(keys, key, "lr_schedule", "kind", keys.read(key, convert), option)
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
    keys.put("loss_type", "objective.loss", ours, hint="choose objective.loss")
    if "huber_c" in keys:
        if ours in {"huber", "pseudo_huber"} and ours == keys.draft.chosen("objective.loss"):
            put_option(keys, "huber_c", "objective", "loss", keys.read("huber_c", v.number),
                       "delta", "huber_delta", "c")  # fmt: skip
        else:
            keys.same("huber_c", f"without meaning for {name}")


def ema(keys: Keys) -> None:
    """A running mean of the weights, where Menma has one."""
    on = v.is_on(keys.get("use_ema"))
    options: Mapping[str, tuple[tuple[str, ...], Any, Any]] = {
        "use_ema": (("ema.enabled", "training.ema"), v.flag, True),
        "ema_decay": (("ema.decay", "training.ema_decay"), v.number, 0.995),
        "ema_update_interval": (("ema.every_steps", "ema.update_every_steps"), v.whole, 1),
    }
    for key, (targets, convert, default) in options.items():
        target = keys.draft.first_known(targets)
        if not on:
            keys.same(key, "off, as in Menma")
        elif target is None:
            keys.lacks(key, "Menma keeps no running mean while it trains yet",
                       "average output files afterwards: `menma lora ema`")  # fmt: skip
        else:
            keys.put(key, target, keys.read(key, convert, default))
    for key in ("ema_device", "ema_cpu_only", "ema_foreach_disable", "ema_validation"):
        keys.done(key, "Menma chooses this" if on else "use_ema is off")


def logs(keys: Keys) -> None:
    """Trackers; Weights & Biases is the default there."""
    tools = set(v.words(str(keys.get("report_to") or "").lower()))
    tools = {"tensorboard", "wandb"} if "all" in tools else tools
    if "tensorboard" in tools:
        keys.put("report_to", "logging.tensorboard", value=True)
    if "wandb" in tools:
        target = keys.draft.first_known(("logging.wandb",))
        if target is None:
            keys.lacks("report_to", "Menma does not log to Weights & Biases yet")
        else:
            keys.put("report_to", target, value=True)
            keys.draft.values[target] = True
    for tool in sorted(tools - {"tensorboard", "wandb", "none"}):
        keys.lacks("report_to", f"Menma does not log to {tool}")


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
    off = v.is_on(keys.get("validation_disable"))
    every = next((k for k in ("validation_step_interval", "validation_steps") if k in keys), "")
    prompts = [] if off else _prompts(keys)
    for index, prompt in enumerate(prompts):
        keys.draft.values[f"sampling.prompts[{index}].prompt"] = prompt
    if every and not off:
        steps = keys.read(every, v.positive)
        if steps and prompts:
            keys.put(every, "sampling.every_steps", steps)
        elif steps:
            keys.lacks(every, "there is no prompt", "add [[sampling.prompts]]")
    if off:
        keys.done("validation_disable", "sampling.every_steps is 0")
        for key in ("validation_step_interval", "validation_steps"):
            keys.same(key, "validation_disable is on")
    if v.is_on(keys.get("validation_on_startup")) and prompts and not off:
        keys.put("validation_on_startup", "sampling.at_start", value=True)


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
    for name in ("checkpoint_epoch_interval", "validation_epoch_interval", "eval_epoch_interval"):
        if keys.get(name):
            keys.lacks(name, EPOCHS_HINT, "set the interval in steps")


def names(keys: Keys) -> None:
    """Name and folder of the run."""
    folder = Path(str(keys.get("output_dir") or "simpletuner-results"))
    keys.draft.values["name"] = v_name(folder.name)
    if "output_dir" in keys:
        keys.put("output_dir", "output.runs_dir", str(folder.parent),
                 note="the run writes into <output.runs_dir>/<name>")  # fmt: skip
    layout = str(keys.get("lora_format") or "diffusers").lower()
    keys.put("lora_format", "output.layout", "comfy" if layout == "comfyui" else "peft")
