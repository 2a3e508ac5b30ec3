"""The options of musubi-tuner's Wan scripts.

Names and defaults: its argument parsers (training, caching), version 0.3.4.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath

from app.domain.importing import musubi_groups as groups
from app.domain.importing import values as v
from app.domain.importing.musubi_data import datasets
from app.domain.importing.musubi_network import network
from app.domain.importing.prompts import prompts
from app.domain.importing.tables import (
    Done,
    Group,
    Keys,
    Lacks,
    Rule,
    Secret,
    Table,
    To,
)

TASKS: Mapping[str, str] = {
    "t2v-14B": "wan2.1-t2v-14b",
    "t2v-1.3B": "wan2.1-t2v-1.3b",
    "i2v-14B": "wan2.1-i2v-14b",
    "t2i-14B": "wan2.1-t2v-14b",
    "flf2v-14B": "wan2.1-flf2v-14b",
    "t2v-1.3B-FC": "wan2.1-fun-control-1.3b",
    "t2v-14B-FC": "wan2.1-fun-control-14b",
    "i2v-14B-FC": "wan2.1-fun-control-14b",
    "t2v-A14B": "wan2.2-t2v-a14b",
    "i2v-A14B": "wan2.2-i2v-a14b",
}
DEFAULT_TASK = "t2v-14B"
UPLOAD = Done("`menma push RUN owner/repo` uploads outputs, when you say so", off=(False, None, ""))
RESUME = "give the last LoRA file as adapter.init_from; the optimizer begins anew"
FP8_TEXT = To(
    "memory.text_encoder_dtype",
    v.one_of({"true": "fp8_scaled", "false": "bf16"}),
    note="with scales; embeddings and norms stay bf16",
)
_WORKERS = "cached items are read ahead of the step, by threads"


def task(keys: Keys) -> None:
    """Write the model variant; musubi-tuner's default is the 14B text-to-video model."""
    name = str(keys.get("task") or DEFAULT_TASK)
    if name not in TASKS:
        keys.lacks("task", f"Menma has no model {name!r}", "set model.variant")
        return
    note = "a text-to-video model trained on images" if name == "t2i-14B" else ""
    keys.put("task", "model.variant", TASKS[name], note=note)


def files(keys: Keys) -> None:
    """Write the other weight files; what a training script leaves out, a cache script may name."""
    named = {"vae": "model.vae", "t5": "model.text_encoder", "clip": "model.image_encoder"}
    for name, target in named.items():
        for key in (name, f"wan_cache_latents.{name}", f"wan_cache_text_encoder_outputs.{name}"):
            if keys.get(key) in (None, ""):
                continue
            if target in keys.draft.values:
                keys.done(key, "given before", target)
                continue
            path, note = keys.weights_of(keys.get(key))
            keys.put(key, target, path, note=note)


def names(keys: Keys) -> None:
    """Write the run's name and folder, and what describes the output file."""
    if keys.get("output_dir"):
        note = "the run writes into <output.runs_dir>/<name>"
        keys.put("output_dir", "output.runs_dir", str(keys.get("output_dir")), note=note)
    if keys.get("output_name"):
        name = v_name(keys.get("output_name"))
        note = "" if name == keys.get("output_name") else "letters, digits, '.', '_' and '-'"
        keys.put("output_name", "name", name, note=note)
    tags = keys.read("metadata_tags", v.words, [])
    if tags:
        keys.put("metadata_tags", "output.tags", tags)
    if keys.get("metadata_description"):
        keys.put(
            "metadata_description", "output.description", str(keys.get("metadata_description"))
        )
        keys.lacks("training_comment", "metadata_description is taken for output.description")
    elif keys.get("training_comment"):
        keys.put("training_comment", "output.description", str(keys.get("training_comment")))


def v_name(value: object) -> str:
    """Return a name that a run may have."""
    import re

    found = re.sub(r"[^A-Za-z0-9._-]+", "-", PurePath(str(value)).name).strip("._-")
    return found[:100] or "imported"


def dataset_file(keys: Keys) -> None:
    """Name the dataset file where it could not be read."""
    if any(key.startswith(("datasets[", "general.")) for key in keys.values):
        keys.done("dataset_config", "its tables stand in the config: [[dataset.sources]]")
    elif keys.get("dataset_config"):
        note = "it could not be read, so its keys are not checked"
        keys.put("dataset_config", "dataset.file", str(keys.get("dataset_config")), note=note)


RULES: Mapping[str, Rule] = {
    "config_file": Done("its keys are listed here"),
    "max_train_steps": To("training.max_steps", v.positive),
    "max_train_epochs": To("training.epochs", v.positive),
    "gradient_accumulation_steps": To("training.gradient_accumulation_steps", v.positive),
    "seed": To("training.seed", v.whole),
    "max_data_loader_n_workers": Done(_WORKERS, off=()),
    "persistent_data_loader_workers": Done(_WORKERS),
    "max_grad_norm": To("optimizer.max_grad_norm", v.number),
    "ddp_timeout": To("distributed.timeout_s", v.minutes, note="seconds instead of minutes"),
    "ddp_gradient_as_bucket_view": Done("DeepSpeed reduces gradients in buckets of its own"),
    "ddp_static_graph": Done("DeepSpeed needs no static graph"),
    "cuda_allow_tf32": Done("weights and activations are bf16"),
    "cuda_cudnn_benchmark": Done("the transformer has no convolution that would gain by it"),
    "img_in_txt_in_offloading": Done("without effect for Wan, there too"),
    "disable_numpy_memmap": Done("weight files are mapped, and read in order"),
    "offload_inactive_dit": Done("the idle expert always waits in RAM"),
    "lazy_loading": Done("the idle expert always waits in RAM"),
    "force_v2_1_time_embedding": Done("one vector a sample is used wherever it gives the same"),
    "vae_dtype": To(
        "memory.vae_dtype",
        v.one_of({"bfloat16": "bf16", "bf16": "bf16", "float32": "fp32", "fp32": "fp32",
                  "float": "fp32", "float16": "bf16", "fp16": "bf16"}),
    ),
    "vae_cache_cpu": Done("memory.vae_tile saves memory of the VAE"),
    "fp8_t5": FP8_TEXT,
    "one_frame": Lacks("Menma has no one-frame training"),
    "guidance_scale": Done("of HunyuanVideo only: without effect for Wan, there too", off=()),
    "show_timesteps": Done("it shows a picture instead of training"),
    "log_prefix": Done("logs stand in the run directory"),
    "log_tracker_name": To("logging.wandb_project", v.text),
    "wandb_run_name": To("logging.wandb_run_name", v.text),
    "log_tracker_config": Lacks("trackers have no file of their own"),
    "log_config": Done("config.toml in the run directory is what ran"),
    "wandb_api_key": Secret("set WANDB_API_KEY in the environment"),
    "huggingface_token": Secret("log in with `hf auth login`"),
    "metadata_title": To("output.title", v.text),
    "metadata_author": To("output.author", v.text),
    "metadata_license": To("output.license", v.text),
    "metadata_reso": Done("written from the config"),
    "metadata_arch": Done("written from the model"),
    "no_metadata": Lacks("output files always say what they are", "merge tools need it"),
    "save_precision": To(
        "output.dtype",
        v.one_of({"float": "fp32", "fp32": "fp32", "float32": "fp32", "bf16": "bf16",
                  "bfloat16": "bf16", "fp16": "fp16", "float16": "fp16"}),
        default="fp32",
    ),
    "resume": Lacks("the state of another trainer cannot be read", RESUME),
    "resume_from_huggingface": Lacks("the state of another trainer cannot be read", RESUME),
    "save_state_to_huggingface": Lacks("states stay on this machine"),
    "async_upload": UPLOAD,
    **{f"huggingface_{part}": UPLOAD
       for part in ("repo_id", "repo_type", "path_in_repo", "repo_visibility")},
    "fused_backward_pass": Lacks("Menma does not step in the backward pass",
                                 "distributed.zero_stage and offload_optimizer save memory"),
    "full_bf16": Done("what is trained has fp32 masters"),
    "full_fp16": Done("what is trained has fp32 masters"),
    "mem_eff_save": Done("output files are written one tensor after the other"),
    "block_swap_optimizer_patch_params": Done("frozen blocks have no optimizer"),
    # accelerate's own options, before the script
    "accelerate.num_processes": To("distributed.num_processes", v.positive),
    "accelerate.mixed_precision": Done("see mixed_precision"),
    "accelerate.num_cpu_threads_per_process": Done(_WORKERS, off=()),
    "accelerate.num_machines": Lacks("machines are listed in a file", "docs/clusters.md"),
    "accelerate.multi_gpu": Done("distributed.num_processes"),
    "accelerate.dynamo_backend": Done("see memory.compile_blocks", off=("no", "NO")),
    "accelerate.config_file": Lacks("files of accelerate are not read",
                                    "see [distributed] in docs/config.md"),
    "accelerate.gpu_ids": Done("set CUDA_VISIBLE_DEVICES"),
    "accelerate.main_process_port": Done("a free port is chosen"),
}  # fmt: skip

PATTERNS: tuple[tuple[str, Rule], ...] = (
    (r"wan_cache_\w+\.dataset_config", Done("the dataset of training")),
    (r"wan_cache_\w+\.(batch_size|num_workers|device)", Done("Menma chooses this", off=())),
    (r"wan_cache_\w+\.(skip_existing|keep_cache)",
     Done("what is cached and has not changed is kept; nothing is removed without --prune")),
    (r"wan_cache_latents\.i2v", Done("the variant says it: model.variant")),
    (r"wan_cache_latents\.vae_dtype", Done("see memory.vae_dtype")),
    (r"wan_cache_latents\.(vae_cache_cpu|disable_cudnn_backend)",
     Done("memory.vae_tile saves memory of the VAE")),
    (r"wan_cache_latents\.(debug_mode|console_\w+)", Done("`menma check` shows the buckets", ())),
    (r"wan_cache_latents\.one_frame", Lacks("Menma has no one-frame training")),
    (r"wan_cache_text_encoder_outputs\.fp8_t5", FP8_TEXT),
    (r"accelerate\..*", Done("Menma starts its processes by itself", off=())),
)  # fmt: skip

GROUPS: tuple[Group, ...] = (
    Group(("task",), task),
    Group(("vae", "t5", "clip", "wan_cache_latents.vae", "wan_cache_latents.clip",
           "wan_cache_text_encoder_outputs.t5"), files),
    Group(("sdpa", "flash_attn", "flash3", "xformers", "sage_attn", "split_attn"),
          groups.attention),
    Group(("compile", "compile_backend", "compile_mode", "compile_dynamic", "compile_fullgraph",
           "compile_cache_size_limit", "dynamo_backend", "dynamo_mode", "dynamo_fullgraph",
           "dynamo_dynamic"), groups.compiling),
    Group(("fp8_base", "fp8_scaled", "mixed_precision"), groups.precision),
    Group(("gradient_checkpointing", "gradient_checkpointing_cpu_offload", "blocks_to_swap",
           "block_swap_h2d_only", "use_pinned_memory_for_block_swap", "block_swap_ring_size"),
          groups.memory),
    Group(("log_with", "logging_dir"), groups.logs),
    Group(("optimizer_type", "optimizer_args", "optimizer_args.*", "learning_rate"),
          groups.optimizer),
    Group(("lr_scheduler", "lr_warmup_steps", "lr_decay_steps", "lr_scheduler_num_cycles",
           "lr_scheduler_power", "lr_scheduler_timescale", "lr_scheduler_min_lr_ratio",
           "lr_scheduler_type", "lr_scheduler_args", "lr_scheduler_args.*"), groups.schedule),
    Group(("network_module", "network_dim", "network_alpha", "network_dropout", "network_args",
           "network_args.*", "network_weights", "dim_from_weights", "base_weights",
           "base_weights_multiplier", "scale_weight_norms"), network),
    Group(("dit", "dit_high_noise", "timestep_boundary", "min_timestep", "max_timestep",
           "preserve_distribution_shape"), groups.experts),
    Group(("timestep_sampling", "discrete_flow_shift", "sigmoid_scale", "weighting_scheme",
           "logit_mean", "logit_std", "mode_scale", "num_timestep_buckets"), groups.timesteps),
    Group(("sample_every_n_steps", "sample_every_n_epochs", "sample_at_first"), groups.sampling),
    Group(("sample_prompts", "sample_prompts[*"), prompts),
    Group(("save_every_n_steps", "save_every_n_epochs", "save_state", "save_state_on_train_end",
           "save_last_n_steps", "save_last_n_epochs", "save_last_n_steps_state",
           "save_last_n_epochs_state"), groups.saving),
    Group(("output_dir", "output_name", "metadata_tags", "metadata_description",
           "training_comment"), names),
    Group(("dataset_config",), dataset_file),
    Group((), datasets, of_dataset=True),
)  # fmt: skip

TABLE = Table("musubi-tuner", RULES, GROUPS, PATTERNS)
