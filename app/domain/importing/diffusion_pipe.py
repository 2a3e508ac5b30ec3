"""diffusion-pipe: its TOML for Wan, and its dataset TOML.

Names and defaults: its examples, docs and training script.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from app.domain.importing import values as v
from app.domain.importing.diffusion_pipe_data import datasets
from app.domain.importing.kinds import (
    OPTIMIZERS,
    plain_name,
    put_argument,
    put_optimizer,
    put_option,
    put_schedule,
)
from app.domain.importing.musubi import v_name
from app.domain.importing.musubi_groups import EPOCHS_HINT, epoch_interval
from app.domain.importing.tables import Done, Group, Keys, Lacks, Rule, Secret, Table, To
from trainer.contract.catalog import PLUGIN_KINDS
from trainer.contract.variants import VARIANTS

_NAMES = (
    (r"ti2v.*5b|5b", "wan2.2-ti2v-5b"),
    (r"2\.?2.*i2v", "wan2.2-i2v-a14b"),
    (r"2\.?2.*t2v|a14b", "wan2.2-t2v-a14b"),
    (r"flf2v", "wan2.1-flf2v-14b"),
    (r"i2v", "wan2.1-i2v-14b"),
    (r"1\.3b", "wan2.1-t2v-1.3b"),
    (r"t2v|14b", "wan2.1-t2v-14b"),
)
"""What a folder of weights is called -> the variant that it holds."""


def model(keys: Keys) -> None:
    """Weights, variant and expert from the checkpoint folder and what is named beside it."""
    folder = str(keys.get("model.ckpt_path") or "")
    transformer = keys.get("model.transformer_path")
    name = f"{Path(folder).name} {transformer or ''}".lower()
    variant = next((found for pattern, found in _NAMES if re.search(pattern, name)), None)
    if variant is not None:
        keys.draft.values["model.variant"] = variant
    else:
        keys.draft.notes.append("the names of the weights do not say which Wan it is: "
                                "set model.variant")  # fmt: skip
    known = VARIANTS.get(str(variant))
    target = "model.transformer"
    if known is not None and known.experts:
        expert = _expert(keys, known.expert_boundary, str(transformer or ""))
        keys.draft.values["model.expert"] = expert
        target = "model.transformer_high_noise" if expert == "high_noise" else target
    if transformer:
        path, note = keys.weights_of(transformer)
        keys.put("model.transformer_path", target, path, note=note)
    elif folder:
        keys.draft.values[target] = folder
    if folder:
        vae = "Wan2.2_VAE.pth" if variant == "wan2.2-ti2v-5b" else "Wan2.1_VAE.pth"
        keys.draft.values["model.vae"] = f"{folder}/{vae}"
        if known is not None and known.transformer.image_dim is not None:
            keys.draft.values["model.image_encoder"] = (
                f"{folder}/models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
            )
        keys.draft.values["model.tokenizer"] = f"{folder}/google/umt5-xxl"
        keys.done("model.ckpt_path", "the files in it that Menma needs are named one by one",
                  "model.vae")  # fmt: skip
    if keys.get("model.llm_path"):
        path, note = keys.weights_of(keys.get("model.llm_path"))
        keys.put("model.llm_path", "model.text_encoder", path, note=note)
    elif folder:
        keys.draft.values["model.text_encoder"] = f"{folder}/models_t5_umt5-xxl-enc-bf16.pth"


def _expert(keys: Keys, boundary: float, name: str) -> str:
    low = keys.read("model.min_t", v.number, 0.0)
    high = keys.read("model.max_t", v.number, 1.0)
    if low > 0 or high < 1:
        return "high_noise" if (low + high) / 2 >= boundary else "low_noise"
    return "high_noise" if "high" in name.lower() else "low_noise"


def precision(keys: Keys) -> None:
    """Precision of the frozen weights."""
    word = str(keys.get("model.dtype") or "bfloat16")
    if word == "bfloat16":
        keys.same("model.dtype", "Menma computes in bf16")
    elif word == "float32":
        keys.put("model.dtype", "memory.weight_format", "fp32")
    else:
        keys.done("model.dtype", "Menma computes in bf16")
    frozen = str(keys.get("model.transformer_dtype") or "")
    if frozen.startswith("float8"):
        keys.put("model.transformer_dtype", "memory.weight_format", "fp8",
                 note='cast as there; "fp8_scaled" is more exact at the same size')  # fmt: skip
        if frozen.endswith("e5m2"):
            keys.draft.values["memory.fp8_format"] = "e5m2"
    elif frozen in {"bfloat16", ""}:
        keys.same("model.transformer_dtype", "as in Menma")
    elif frozen:
        keys.lacks("model.transformer_dtype", f"Menma has no weights in {frozen}",
                   'memory.weight_format = "fp8_scaled" is half of bf16')  # fmt: skip


def timesteps(keys: Keys) -> None:
    """A logit-normal or uniform density, shifted, cut to a range."""
    method = str(keys.get("model.timestep_sample_method") or "logit_normal")
    shift = keys.read("model.shift", v.number)
    flux = keys.read("model.flux_shift", v.flag, default=False) and not shift
    key, kinds = "model.timestep_sample_method", PLUGIN_KINDS["timestep_sampler"]
    if method == "uniform":
        keys.put(key, "objective.timestep_sampler", "uniform")
    elif method == "logit_normal":
        kind = "flux_shift" if flux and "flux_shift" in kinds else "shift"
        note = "a sigmoid of a normal, as there" if key in keys else ""
        keys.put(key, "objective.timestep_sampler", kind, note=note)
    else:
        keys.lacks(key, f"Menma has no {method!r}", "choose objective.timestep_sampler")
    sampler = keys.draft.chosen("objective.timestep_sampler")
    if sampler == "shift":
        keys.put("model.shift", "objective.flow_shift", float(shift or 1.0), as_="model.shift")
    elif shift:
        keys.lacks("model.shift", f"timestep_sampler {sampler!r} has no shift here")
    if flux and sampler == "flux_shift":
        keys.done("model.flux_shift", "timestep_sampler flux_shift", "objective.timestep_sampler")
    elif flux:
        keys.lacks(
            "model.flux_shift",
            "Menma has no shift by resolution yet",
            "832x480 has a shift of 2.06, 1280x720 of 2.90: set objective.flow_shift",
        )
    scale = keys.read("model.sigmoid_scale", v.number)
    if scale:
        put_option(keys, "model.sigmoid_scale", "objective", "timestep_sampler", scale,
                   "sigmoid_scale")  # fmt: skip
    bounded = False
    for name, target in (("model.min_t", "min_timestep"), ("model.max_t", "max_timestep")):
        value = keys.read(name, v.number)
        if value is not None:
            keys.put(name, f"objective.{target}", round(1000 * value, 6), note="0 to 1000")
            bounded = True
    if bounded or "model.expert" in keys.draft.values:
        # The density is cut there, not squeezed.
        keys.draft.values["objective.preserve_distribution_shape"] = True
    if not bounded and "model.expert" in keys.draft.values:
        keys.draft.values["objective.min_timestep"] = 0.0
        keys.draft.values["objective.max_timestep"] = 1000.0


def adapter(keys: Keys) -> None:
    """What is trained; without the table it is the whole model."""
    if not keys.below("adapter"):
        keys.draft.values["adapter.kind"] = "none"
        keys.draft.notes.append("there is no [adapter]: the whole model is trained")
        return
    kind = str(keys.get("adapter.type") or "lora").lower()
    if kind not in PLUGIN_KINDS["adapter"]:
        keys.lacks("adapter.type", f"Menma has no adapter {kind!r}", "choose adapter.kind")
        kind = "lora"
    else:
        keys.put("adapter.type", "adapter.kind", kind)
    rank = keys.read("adapter.rank", v.whole)
    if rank is not None:
        keys.put("adapter.rank", "adapter.rank", min(rank, 4096),
                 note="4096 trains W2 whole, too" if rank > 4096 else "")  # fmt: skip
    if "adapter.alpha" in keys:
        keys.done("adapter.alpha", "it is the rank there, whatever is said; in Menma, too")
    keys.same("adapter.dtype", "what is trained has fp32 masters")
    for name, option, convert in (
        ("adapter.dropout", "dropout", v.number), ("adapter.decompose_factor", "factor", v.whole),
        ("adapter.init_from_existing", "init_from", v.text),
    ):  # fmt: skip
        value = keys.read(name, convert)
        if value not in (None, 0, -1):
            put_option(keys, name, "adapter", "kind", value, option)
    fused = keys.get("adapter.fuse_adapters")
    if isinstance(fused, list) and fused and all(isinstance(one, dict) for one in fused):
        frozen = [{"path": str(one.get("path", "")), "strength": float(one.get("weight", 1.0))}
                  for one in fused if isinstance(one.get("weight", 1.0), int | float)]  # fmt: skip
        keys.put("adapter.fuse_adapters", "adapter.frozen", frozen, note="put on the base and not "
                 "trained, instead of merged into it: the same sum")  # fmt: skip


def optimizer(keys: Keys) -> None:
    """Optimizer with its options; optimi's keeps Kahan sums, Menma fp32 masters."""
    name = str(keys.get("optimizer.type") or "AdamW")
    if plain_name(name) not in OPTIMIZERS and "." not in name:
        name = f"pytorch_optimizer.{name}"  # where it looks for all others
    takes_rate = put_optimizer(keys, "optimizer.type", name)
    refused = "optimizer.type" in keys.reported and keys.reported["optimizer.type"].is_lost
    rate = keys.read("optimizer.lr", v.number)
    if rate is not None and takes_rate:
        keys.put("optimizer.lr", "optimizer.learning_rate", rate)
    else:
        keys.lacks("optimizer.lr", "a rate of the optimizer that Menma lacks")
    if "optimizer.gradient_release" in keys:
        keys.rule("optimizer.gradient_release", Lacks(
            "Menma does not step in the backward pass", "distributed.zero_stage and "
            "offload_optimizer save memory"))  # fmt: skip
    for key in keys.below("optimizer"):
        option = key.partition(".")[2]
        if option in {"type", "lr", "gradient_release"}:
            continue
        if refused:
            keys.lacks(key, "an option of the optimizer that Menma lacks")
        elif option in {"stabilize", "kahan_sum", "foreach", "fused"}:
            keys.done(key, "fp32 masters and fused kernels are used where they help")
        else:
            put_argument(keys, key, option, keys.read(key, v.literal))


def schedule(keys: Keys) -> None:
    """Constant or linear, after the warm-up."""
    put_schedule(keys, "lr_scheduler", str(keys.get("lr_scheduler") or "constant"))
    steps = keys.read("warmup_steps", v.whole, 0)
    keys.put("warmup_steps", "lr_schedule.warmup_steps", steps)
    rate = keys.read("force_constant_lr", v.number)
    if rate:
        keys.draft.values["optimizer.learning_rate"] = rate
        keys.done("force_constant_lr", "the rate of the optimizer", "optimizer.learning_rate")


def length(keys: Keys) -> None:
    """Steps or epochs, whichever ends first there; Menma has one of the two."""
    steps, epochs = keys.read("max_steps", v.positive), keys.read("epochs", v.positive)
    if steps:
        keys.put("max_steps", "training.max_steps", steps)
        keys.done("epochs", "max_steps is given, too: it decides")
    elif epochs:
        keys.put("epochs", "training.epochs", epochs)


def saving(keys: Keys) -> None:
    """Output files and checkpoints."""
    steps = keys.read("save_every_n_steps", v.positive)
    if steps:
        keys.put("save_every_n_steps", "output.every_steps", steps)
    checkpoints = keys.read("checkpoint_every_n_steps", v.positive)
    if checkpoints:
        keys.put("checkpoint_every_n_steps", "checkpoint.every_steps", checkpoints)
    epoch_interval(keys, "save_every_n_epochs", "output")
    epoch_interval(keys, "checkpoint_every_n_epochs", "checkpoint")
    minutes = keys.read("checkpoint_every_n_minutes", v.number)
    if minutes:
        keys.put("checkpoint_every_n_minutes", "checkpoint.every_minutes", minutes)
    if keys.read("save_every_n_examples", v.positive):
        keys.lacks("save_every_n_examples", EPOCHS_HINT, "set output.every_steps")
    has_eval = any(key.startswith("eval_directory[") for key in keys.values)
    for unit in ("steps", "epochs"):
        key = f"eval_every_n_{unit}"
        evals = keys.read(key, v.positive)
        if evals and has_eval:
            keys.put(key, f"validation.every_{unit}", evals)
        elif evals:
            keys.lacks(key, "there are no clips to measure on",
                       f"set validation.split = 0.1 and validation.every_{unit}")  # fmt: skip
    if "eval_before_first_step" in keys:
        on = keys.read("eval_before_first_step", v.flag, default=True)
        keys.put("eval_before_first_step", "validation.at_start", on)
    if keys.read("eval_every_n_examples", v.positive):
        keys.lacks("eval_every_n_examples", EPOCHS_HINT, "set validation.every_steps")


def names(keys: Keys) -> None:
    """Folder of the runs; a run there is named by its time, here by its folder."""
    if keys.get("output_dir"):
        folder = Path(str(keys.get("output_dir")))
        keys.draft.values["name"] = v_name(folder.name)
        keys.put("output_dir", "output.runs_dir", str(folder.parent),
                 note="the run writes into <output.runs_dir>/<name>")  # fmt: skip


def batches(keys: Keys) -> None:
    """Batch sizes belong to the sources."""
    size = keys.get("micro_batch_size_per_gpu")
    if isinstance(size, list):
        keys.lacks("micro_batch_size_per_gpu", "batch sizes by resolution belong to the sources",
                   "set batch_size in each [[dataset.sources]]")  # fmt: skip
    else:
        keys.done("micro_batch_size_per_gpu", "batch_size of each source")
    keys.done("image_micro_batch_size_per_gpu", "batch_size of the sources of images")
    mode = str(keys.get("video_clip_mode") or "single_beginning")
    if mode == "single_beginning":
        keys.done("video_clip_mode", 'frame_extraction = "head"')
    elif any(k.endswith(".frame_extraction") for k in keys.draft.values):
        keys.done("video_clip_mode", "frame_extraction of each source")
    else:
        keys.lacks("video_clip_mode", f"Menma has no {mode!r} yet; windows begin at the start",
                   "choose frame_extraction in [[dataset.sources]]")  # fmt: skip


def loss(keys: Keys) -> None:
    """Squared error, or pseudo-Huber where its constant is given."""
    constant = keys.read("pseudo_huber_c", v.number)
    if constant:
        keys.draft.values["objective.loss"] = "pseudo_huber"
        note = 'loss = "pseudo_huber", scaled so that small errors cost as much as with mse'
        keys.put("pseudo_huber_c", "objective.huber_delta", constant, note=note)


def logs(keys: Keys) -> None:
    """TensorBoard always, Weights & Biases where it is enabled."""
    keys.draft.values["logging.tensorboard"] = True
    on = v.is_on(keys.get("monitoring.enable_wandb"))
    if not on:
        for key in keys.below("monitoring"):
            keys.same(key, "Weights & Biases is off")
        return
    keys.put("monitoring.enable_wandb", "logging.wandb", value=True)


RULES: Mapping[str, Rule] = {
    "model.type": Done("model.variant", off=()),
    "model.guidance": Done("without effect for Wan, there too", off=()),
    "model.cache_text_embeddings": Done("captions are always cached", off=()),
    "model.text_encoder_fp8": Done("captions are encoded once; the text encoder is bf16"),
    "gradient_accumulation_steps": To("training.gradient_accumulation_steps", v.positive),
    "gradient_clipping": To("optimizer.max_grad_norm", v.number, default=1.0),
    "blocks_to_swap": To("memory.blocks_to_swap", v.positive),
    "activation_checkpointing": To(
        "memory.gradient_checkpointing",
        lambda value: True if value == "unsloth" else v.flag(value), default=False,
    ),
    "reentrant_activation_checkpointing": Done("Menma recomputes without re-entering autograd"),
    "pipeline_stages": Lacks("Menma does not cut a model into stages",
                             "sequence_parallel or zero_stage 3 share it", off=(1,)),
    "partition_method": Done("of pipeline_stages", off=()),
    "partition_split": Done("of pipeline_stages", off=()),
    "save_dtype": To("output.dtype", v.one_of({
        "bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}), default="bfloat16"),
    "compile": To("memory.compile_blocks", v.flag),
    "caching_batch_size": Done("`menma cache` encodes window by window", off=()),
    "map_num_proc": Done("`menma cache` chooses this", off=()),
    "steps_per_print": Done("every step stands in events.jsonl", off=()),
    "logging_steps": Done("every step stands in events.jsonl", off=()),
    "x_axis_examples": Done("figures are by step"),
    "resume_from_checkpoint": Lacks("the state of another trainer cannot be read",
                                    "adapter.init_from with the last adapter_model.safetensors"),
    "regenerate_cache": Done("what has changed is cached again"),
    "eval_datasets": Lacks("give clips to measure on in [[validation.sources]]",
                           "or set validation.split = 0.1", off=([],)),
    "eval_micro_batch_size_per_gpu": To("validation.batch_size", v.positive),
    "image_eval_micro_batch_size_per_gpu": Done("validation.batch_size", off=()),
    "eval_gradient_accumulation_steps": Done("validation adds up over all clips", off=()),
    "disable_block_swap_for_eval": Done("blocks are swapped in validation, too", off=()),
    "huggingface_repo": Done("`menma push RUN owner/repo` uploads outputs, when you say so"),
    "upload_hf_from_epoch": Done("of huggingface_repo", off=()),
    "monitoring.wandb_api_key": Secret("set WANDB_API_KEY in the environment"),
    "monitoring.wandb_tracker_name": To("logging.wandb_project", v.text),
    "monitoring.wandb_run_name": To("logging.wandb_run_name", v.text),
}  # fmt: skip
GROUPS: tuple[Group, ...] = (
    Group(("model.ckpt_path", "model.transformer_path", "model.llm_path"), model),
    Group(("model.dtype", "model.transformer_dtype"), precision),
    Group(("model.timestep_sample_method", "model.shift", "model.flux_shift",
           "model.sigmoid_scale", "model.min_t", "model.max_t"), timesteps),
    Group(("adapter.*",), adapter),
    Group(("optimizer.*",), optimizer),
    Group(("lr_scheduler", "warmup_steps", "force_constant_lr"), schedule),
    Group(("max_steps", "epochs"), length),
    Group(("save_every_n_epochs", "save_every_n_steps", "save_every_n_examples",
           "checkpoint_every_n_epochs", "checkpoint_every_n_minutes", "checkpoint_every_n_steps",
           "eval_every_n_steps", "eval_every_n_epochs", "eval_every_n_examples",
           "eval_before_first_step"), saving),
    Group(("output_dir",), names),
    Group(("dataset",), datasets, of_dataset=True),
    Group(("micro_batch_size_per_gpu", "image_micro_batch_size_per_gpu", "video_clip_mode"),
          batches),
    Group(("pseudo_huber_c",), loss),
    Group((), logs),
)  # fmt: skip

TABLE = Table("diffusion-pipe", RULES, GROUPS)
