"""Takenoko's one-file config: musubi-tuner's options, many more, and its datasets.

Defaults: what its code takes for a key that is left out, which often is not what its template says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.domain.importing import musubi
from app.domain.importing import values as v
from app.domain.importing.tables import Done, Group, Keys, Lacks, Rule, Table, To

DEFAULTS: Mapping[str, Any] = {
    "learning_rate": 5e-5,
    "network_module": "networks.lora_wan",
    "network_dim": 32,
    "network_alpha": 32,
    "timestep_sampling": "shift",
    "discrete_flow_shift": 3.0,
    "save_every_n_steps": 1000,
    "save_state": True,
    "output_name": "wan21_lora",
    "qinglong_flux": {"noisy_share": 0.075, "clean_share": 0.125},
    "qinglong_qwen": {"noisy_share": 0.075, "clean_share": 0.125},
}
OFF = (False, None, "", 0, 0.0, "off", "none")
RESEARCH = "Menma lacks this technique"
CHOOSE = "techniques that Menma has: [[techniques]] in docs/config.md"


def model(keys: Keys) -> None:
    """Write the variant; Takenoko trains text-to-video 14B models only."""
    name = str(keys.get("target_model") or "wan21").lower()
    found = {"wan21": "wan2.1-t2v-14b", "wan22": "wan2.2-t2v-a14b"}.get(name)
    if found is None:
        keys.lacks("target_model", f"Menma has no model {name!r}", "set model.variant")
    else:
        keys.put("target_model", "model.variant", found)
    if "task" in keys:
        musubi.task(keys)


def dual(keys: Keys) -> None:
    """Both experts are trained where this says so; else the other file is not used."""
    if v.is_on(keys.get("enable_dual_model_training")):
        keys.done("enable_dual_model_training", "one LoRA for both experts", "model.expert")
        return
    keys.same("enable_dual_model_training")
    keys.lacks("dit_high_noise", "enable_dual_model_training is off, so it is not used there")
    keys.lacks("timestep_boundary", "enable_dual_model_training is off, so it is not used there")


def validation(keys: Keys) -> None:
    """Loss on clips that are not trained on."""
    every = keys.read("validate_every_n_steps", v.positive)
    has_clips = any(key.startswith("val[") for key in keys.values)
    if every and has_clips:
        keys.put("validate_every_n_steps", "validation.every_steps", every)
    elif every:
        keys.lacks("validate_every_n_steps", "there are no clips to measure on",
                   "set validation.split = 0.1 and validation.every_steps")  # fmt: skip
    if v.is_on(keys.get("validate_on_epoch_end")):
        if has_clips:
            keys.put("validate_on_epoch_end", "validation.every_epochs", 1)
        else:
            keys.lacks("validate_on_epoch_end", "there are no clips to measure on",
                       "set validation.split = 0.1 and validation.every_epochs = 1")  # fmt: skip
    raw = keys.get("validation_timesteps")
    if raw is None:
        return
    found = keys.read("validation_timesteps", v.numbers, [])
    timesteps = sorted({t for t in found if 0 < t <= 1000})
    if timesteps:
        note = "" if len(timesteps) == len(found) else "those above 0 and up to 1000"
        keys.put("validation_timesteps", "validation.timesteps", timesteps, note=note)


def contrastive(keys: Keys) -> None:
    """Contrastive flow matching is a technique of Menma, too."""
    if not v.is_on(keys.get("enable_contrastive_flow_matching")):
        keys.same("contrastive_flow_lambda", "contrastive flow matching is off")
        return
    weight = keys.read("contrastive_flow_lambda", v.number, 0.05)
    keys.draft.values["techniques"] = [{"name": "contrastive_flow", "weight": weight}]
    keys.done("enable_contrastive_flow_matching", "[[techniques]] contrastive_flow", "techniques")
    keys.done("contrastive_flow_lambda", "its weight", "techniques")


def ema(keys: Keys) -> None:
    """A running mean of the weights; there it has no warm-up."""
    names = [key for key in keys.values if key.startswith(("weight_ema_", "enable_weight_ema"))]
    if not v.is_on(keys.get("enable_weight_ema")):
        for key in names:
            keys.same(key)
        return
    keys.put("weight_ema_decay", "ema.decay", keys.read("weight_ema_decay", v.number, 0.999))
    keys.draft.values["ema.warmup"] = False
    keys.done("enable_weight_ema", "ema.decay above 0", "ema.decay")
    start = keys.read("weight_ema_start_step", v.whole, 0)
    keys.put("weight_ema_start_step", "ema.start_step", max(start, 1))
    every = keys.read("weight_ema_update_interval", v.positive, 1)
    keys.put("weight_ema_update_interval", "ema.every_steps", every)
    on_cpu = str(keys.get("weight_ema_device") or "accelerator").lower() == "cpu"
    keys.put("weight_ema_device", "ema.device", "cpu" if on_cpu else "train")
    use = keys.read("weight_ema_use_for_eval", v.flag, default=True)
    keys.put("weight_ema_use_for_eval", "ema.use_for_validation", use)
    if str(keys.get("weight_ema_eval_mode") or "ema") != "ema":
        keys.lacks("weight_ema_eval_mode", "one loss is measured: ema.use_for_validation")


def losses(keys: Keys) -> None:
    """Pointwise losses by name."""
    name = str(keys.get("loss_type") or "mse").lower()
    names = {"l2": "mse", "mse": "mse", "pure_huber": "huber"}
    note = ""
    if name == "pseudo_huber":
        note = "scaled so that small errors cost as much as with mse"
    keys.put("loss_type", "objective.loss", names.get(name, name), note=note,
             hint="choose objective.loss (docs/config.md)")  # fmt: skip
    for key, names_here in (("huber_delta", ("delta", "huber_delta")),
                            ("pseudo_huber_c", ("huber_delta", "pseudo_huber_c"))):  # fmt: skip
        if key in keys:
            from app.domain.importing.kinds import has_option, put_option

            if any(has_option(keys, "objective", "loss", "loss", n) for n in names_here):
                value = keys.read(key, v.number)
                put_option(keys, key, "objective", "loss", value, *names_here)
            elif keys.reported["loss_type"].is_lost if "loss_type" in keys else False:
                keys.lacks(key, "an option of the loss that Menma lacks")
            else:
                keys.same(key, f"without meaning for loss_type {name}")


RULES: Mapping[str, Rule] = {
    **musubi.RULES,
    "initial_step": Lacks("a run begins at step 0, or where its checkpoint stands"),
    "initial_epoch": Lacks("a run begins at step 0, or where its checkpoint stands", off=(0, 1)),
    "skip_until_initial_step": Done("a resumed run goes on at the next item"),
    "auto_resume": Done("`menma train` goes on by itself", off=()),
    "reset_training_state": Done("`menma train --resume never` begins anew"),
    "allow_dataset_change": Done("a changed dataset is told, and needs to be cached again"),
    "ignore_dataset_compatibility": Done("a changed dataset is told"),
    "save_state_every_n_steps": To("checkpoint.every_steps", v.positive),
    "save_checkpoint_before_sampling": Done("samples cannot spoil a run"),
    "embed_config_in_metadata": Done("config.toml stands in the run directory", off=()),
    "logging_level": Done("events.jsonl has everything", off=()),
    "enhanced_progress_bar": Done("Menma has its own", off=()),
    "launch_tensorboard_server": Done("`tensorboard --logdir runs`; `menma` shows curves, too"),
    "round_training_timesteps": Done("timesteps are continuous", off=()),
    "use_precomputed_timesteps": Done("timesteps are drawn from the formula itself"),
    "precomputed_timestep_buckets": Done("timesteps are drawn from the formula itself", off=()),
    "skip_extra_timestep_constraint": Done("the range is [objective]'s", off=()),
    "timestep_constraint_epsilon": Done("the range is [objective]'s", off=()),
    "fast_rejection_sampling": Done("redrawing costs nothing beside a step"),
    "rejection_overdraw_factor": Done("redrawing costs nothing beside a step", off=()),
    "rejection_max_iters": Done("redrawing costs nothing beside a step", off=()),
    "broadcast_time_embed": Done("one vector a sample is used wherever it gives the same", off=()),
    "allow_mixed_block_swap_offload": Done("blocks of both experts may be swapped"),
    "dual_timestep_bucket_strategy": Done("experts take turns: [experts]", off=()),
    "dual_timestep_bucket_max_retries": Done("experts take turns: [experts]", off=()),
    "dual_timestep_bucket_eps": Done("experts take turns: [experts]", off=()),
    "data_loader_pin_memory": Done("cached items are read ahead of the step", off=()),
    "data_loader_prefetch_factor": Done("cached items are read ahead of the step", off=()),
    "use_unique_noise_per_batch": Done("each item has noise of its own, the same each time",
                                       off=()),
    "validation_timesteps_mode": Done("the timesteps are fixed, so losses can be compared",
                                      off=("fixed",)),
    "frozen_network_weights": To("adapter.frozen", v.several),
    "freeze_early_blocks": Lacks("not by a number", r"adapter.exclude = ['blocks\.<0-3>\..*']"),
    "fp8_format": To("memory.fp8_format", v.one_of({"e4m3": "e4m3", "e5m2": "e5m2"})),
    "optimized_torch_compile": To("memory.compile_blocks", v.flag),
    "compile_args": Done("Menma chooses this for its blocks", off=()),
    "prior_loss_weight": Lacks("no source has is_reg", "set its loss_weight", off=(1, 1.0)),
    "num_processes": To("distributed.num_processes", v.positive),
    "lycoris": Done("network_args say which"),
    "verbose_network": Done("what is trained is listed by `menma lora targets`"),
    "log_timestep_distribution": Done("`menma estimate` and docs/config.md say how they fall",
                                      off=OFF),
    "use_stochastic_rounding": Done("what is trained has fp32 masters", off=()),
    "lean_attn_math": Done("attention computes in bf16", off=()),
    "use_regex_lora_targets": Done("adapter.include and adapter.exclude"),
    "fine_tune_ratio": Lacks("Menma trains all of a model, or the layers of adapter.include",
                             off=(1, 1.0)),
}  # fmt: skip
PATTERNS: tuple[tuple[str, Rule], ...] = (
    *musubi.PATTERNS,
    (r"latent_cache\.vae_dtype", Done("see memory.vae_dtype")),
    (r"text_encoder_cache\.fp8_t5", musubi.FP8_TEXT),
    (r"latent_cache\..*|text_encoder_cache\..*", Done("`menma cache` chooses this", off=())),
    (r"log_.*|tensorboard_.*|performance_.*|throughput_.*|ema_loss_.*|attention_metrics_.*|"
     r"snr_.*|val_split_.*|train_metrics_.*|alternate_.*",
     Done("figures of a run stand in events.jsonl; see `menma runs`", off=())),
    (r"cuda_.*|memory_opt_.*|memory_mapping_.*|offload_.*|windows_.*|enable_(memory|zero|non)_.*|"
     r"ramtorch_.*|use_ramtorch_.*|rope_.*|strict_.*|lower_.*|lean_.*|simple_.*|torchao_.*|fp8_.*",
     Lacks("a way to save memory that Menma has not", "[memory] in docs/config.md", OFF)),
    (r"validation_.*|load_val_pixels|enable_(lpips|fvd|vmaf|temporal_\w+|flow_warped_\w+|"
     r"perceptual_snr)|(lpips|fvd|vmaf|temporal_\w+|flow_warped_\w+|perceptual_snr)_.*",
     Lacks("validation measures the loss at fixed timesteps", "`menma eval`", OFF)),
    (r"(enable|use)_.*", Lacks(RESEARCH, CHOOSE, OFF)),
    (r"(adaptive|blank_prompt|bpp|cdc|concept|contrastive|control|controlnet|crepa|"
     r"diff_output|dispersive|dop|fluxflow|fopp|fvdm|haste|internal_guidance|ivon|layersync|"
     r"lambda|lognorm|masked|memflow|mixflow|motion|nabla|optical_flow|ortho|pafm|polylora|"
     r"prior|q_galore|repa|reward|sara|self|semanticgen|slider|sprint|srpo|svi|temporal|tread|"
     r"vae_\w+_weight|vae_training|vae_loss|vae_kl|vae_reconstruction|vae_decoder|videorepa|"
     r"bucket|content_style|time_shift|dim_aware)_?.*",
     Lacks(RESEARCH, CHOOSE, OFF)),
)  # fmt: skip
GROUPS: tuple[Group, ...] = (
    Group(("target_model", "task"), model),
    Group(("enable_dual_model_training",), dual),
    *(group for group in musubi.GROUPS if group.keys != ("task",)),
    Group(("bell_center", "bell_std", "sigmoid_bias"), lambda keys: None),
    Group(("validate_every_n_steps", "validate_on_epoch_end", "validation_timesteps"), validation),
    Group(("enable_contrastive_flow_matching", "contrastive_flow_lambda"), contrastive),
    Group(("enable_weight_ema", "weight_ema_decay", "weight_ema_start_step",
           "weight_ema_update_interval", "weight_ema_*"), ema),
    Group(("loss_type", "huber_delta", "pseudo_huber_c"), losses),
)  # fmt: skip

TABLE = Table("Takenoko", RULES, GROUPS, PATTERNS)
