"""SimpleTuner: config.json or config.env, and multidatabackend.json.

Names and defaults: its argument parser and its documentation of options and data loaders.
"""

from __future__ import annotations

from collections.abc import Mapping

from app.domain.importing import simpletuner_groups as groups
from app.domain.importing import simpletuner_model as model
from app.domain.importing import values as v
from app.domain.importing.simpletuner_data import datasets, dropout
from app.domain.importing.tables import Done, Group, Lacks, Rule, Secret, Table, To

UPLOAD = Done("`menma push RUN owner/repo` uploads outputs, when you say so")
OFF_ONE = (False, None, "", 0, 0.0, 1.0)
RULES: Mapping[str, Rule] = {
    "seed": To("training.seed", v.whole),
    "gradient_accumulation_steps": To("training.gradient_accumulation_steps", v.positive),
    "num_processes": To("distributed.num_processes", v.positive),
    "training_num_processes": To("distributed.num_processes", v.positive),
    "resume_from_checkpoint": Done("`menma train` goes on by itself", off=()),
    "resolution": Done("resolution of each source", off=()),
    "resolution_type": Done("resolution is the area to keep", off=()),
    "logging_dir": Done("logs stand in the run directory", off=()),
    "tracker_run_name": To("logging.wandb_run_name", v.text),
    "tracker_project_name": To("logging.wandb_project", v.text),
    "vae_dtype": To("memory.vae_dtype", v.one_of(
        {"bf16": "bf16", "fp32": "fp32", "fp16": "bf16", "default": "bf16"})),
    "vae_enable_tiling": To("memory.vae_tile", lambda value: 256 if v.flag(value) else None,
                            note="tiles of 256 pixels"),
    "vae_enable_slicing": Done("windows are encoded one by one"),
    "vae_batch_size": Done("windows are encoded one by one", off=()),
    "dynamo_backend": To("memory.compile_blocks",
                         lambda value: str(value).lower() not in {"no", "none", ""} or None),
    "training_dynamo_backend": To("memory.compile_blocks",
                                  lambda v_: str(v_).lower() not in {"no", "none", ""} or None),
    "validation_noise_scheduler": To("sampling.solver", v.one_of(
        {"unipc": "unipc", "euler": "euler", "dpm++": "dpm++"})),
    "framerate": Done("the rate is the model's; source_fps of a source resamples clips"),
    "base_model_default_dtype": Done("Menma computes in bf16", off=()),
    "quantize_via": Done("weights are quantised while they are read", off=()),
    "wandb_api_key": Secret("set WANDB_API_KEY in the environment"),
    "hub_token": Secret("log in with `hf auth login`"),
    "prodigy_steps": Lacks("no such option", "choose optimizer options"),
    "offload_during_startup": Done("one model is loaded at a time when caching", off=()),
    "offload_param_path": To("distributed.nvme_path", v.text),
    "instance_prompt": Lacks("captions are text files beside the clips", "write it into them"),
    "caption_strategy": Done("captions are text files beside the clips", off=("textfile", None)),
    "snr_gamma": Lacks("of models that predict noise", "objective.weighting"),
    "input_perturbation": Lacks("Menma does not perturb inputs"),
    "tread_config": Lacks("Menma lacks this technique"),
    "layer_freeze_strategy": Lacks("not by a word", "adapter.include and adapter.exclude",
                                   off=("none", None)),
    "timestep_bias_strategy": Lacks("timesteps are not biased", "objective.timestep_sampler",
                                    off=("none", None)),
    "validation_prompt_library": Lacks("Menma has no prompts of its own", "[[sampling.prompts]]"),
    "eval_steps_interval": Lacks("validation needs clips",
                                 "set validation.split and validation.every_steps"),
    "eval_dataset_id": Lacks("validation needs clips", "[[validation.sources]]"),
    "distillation_method": Lacks("Menma does not distil"),
    "controlnet": Lacks("Menma has no control networks"),
    "control": Lacks("control clips are backends of their own there",
                     "control_directory of a source, with a Fun-Control model"),
    "webhook_config": Lacks("a file of their own", "logging.webhook is an address"),
    "model_card_note": To("output.description", v.text),
    "masked_loss_probability": Lacks("masks are backends of their own there",
                                     "mask_directory of a source, technique masked_loss",
                                     off=OFF_ONE),
    "train_text_encoder": Lacks("the text encoder is not trained"),
    "set_grads_to_none": Done("gradients are freed", off=()),
    "disable_benchmark": Done("`menma bench` is a command of its own", off=()),
    "ignore_final_epochs": Done("training.max_steps decides"),
    "data_backend_sampling": Done("each item is seen once per repeat and epoch", off=()),
    "aspect_bucket_rounding": Done("buckets have steps of 16 pixels", off=()),
    "aspect_bucket_alignment": Done("buckets have steps of 16 pixels", off=()),
    "max_workers": Done("Menma chooses this", off=()),
    "prediction_type": Done("Wan predicts the velocity", off=()),
    "tokenizer_max_length": Lacks("the model reads 512 tokens", off=(None, 0, 512)),
    "i_know_what_i_am_doing": Done("Menma has no such switch", off=()),
}  # fmt: skip
PATTERNS: tuple[tuple[str, Rule], ...] = (
    (r"push_.*|hub_.*|publishing_.*|model_card_.*|post_\w+_script", UPLOAD),
    (r"crepa_.*|scheduled_sampling_.*|diff2flow_.*|ramtorch.*|refiner_.*|sla_.*|slider_.*",
     Lacks("Menma lacks this technique", "[[techniques]] in docs/config.md",
           off=(False, None, "", 0, 0.0))),
    (r"(flux|sana|sd3|sdxl|ltx|hidream|deepfloyd)_.*", Done("of another model", off=())),
    (r"validation_(external|preview|adapter|torch|seed_source|randomize|using|stitch|guidance|"
     r"lycoris|no_cfg|disable_uncond|method|num_).*|num_validation_images|num_eval_images|eval_.*|"
     r"evaluation_type|pretrained_evaluation_.*",
     Lacks("Menma samples without it", off=(False, None, "", 0, 1, 1.0, "none", "cpu"))),
    (r"dataloader_.*|.*_batch_size|cache_.*|compress_.*|metadata_.*|print_.*|debug_.*|skip_.*|"
     r"override_.*|preserve_.*|vae_cache_.*|vae_.*|text_(cache|encoder)_.*|delete_.*|keep_vae_.*|"
     r"disable_.*|accelerat\w*|torch_num_threads|enable_multiprocessing|read_.*|write_.*|"
     r"image_processing_.*|aspect_bucket_.*|aws_.*|accelerate_.*|webhook_.*|seed_for_.*|"
     r"simpletuner_.*|venv_.*|dynamo_.*|mixed_.*|inference_.*|training_scheduler_.*|"
     r"minimum_.*|maximum_.*|target_.*|max_upscale_.*|checkpointing_.*|checkpoints_.*|fuse_.*|"
     r"optimizer_(cpu|offload|release).*|gradient_precision|ignore_missing.*|allow_.*|offload_.*|"
     r"fully_.*|unet_.*|pretrained_unet_.*|pretrained_transformer_subfolder|revision|variant|"
     r"tracker_.*|parquet_.*|prepend_.*|only_.*|data_aesthetic.*|enable_watermark",
     Done("Menma has no such switch, and needs none", off=())),
)  # fmt: skip
GROUPS: tuple[Group, ...] = (
    Group(("model_family", "model_flavour", *model.PATHS, "wan_force_2_1_time_embedding"),
          model.model),
    Group(("base_model_precision", "mixed_precision"), model.precision),
    Group(("gradient_checkpointing", "gradient_checkpointing_interval", "enable_group_offload",
           "group_offload_*", "enable_chunked_feed_forward", "feed_forward_chunk_size"),
          model.memory),
    Group(("attention_mechanism",), model.attention),
    Group(("model_type", "lora_type", "use_dora", "peft_lora_mode", "lora_rank", "lora_alpha",
           "lora_dropout", "lycoris_config", "lycoris.*", "init_lora", "lora_init_type",
           "singlora_ramp_up_steps"), groups.adapter),
    Group(("optimizer", "learning_rate", "optimizer_beta1", "optimizer_beta2", "adam_beta1",
           "adam_beta2", "adam_weight_decay", "adam_epsilon", "optimizer_config",
           "optimizer_config.*", "max_grad_norm", "grad_clip_method"), groups.optimizer),
    Group(("lr_scheduler", "lr_warmup_steps", "lr_num_cycles", "lr_power", "lr_end", "lr_scale",
           "lr_scale_sqrt"), groups.schedule),
    Group(("max_train_steps", "num_train_epochs"), groups.length),
    Group(("flow_schedule_shift", "flow_schedule_auto_shift", "flow_use_uniform_schedule",
           "flow_use_beta_schedule", "flow_sigmoid_scale", "flow_beta_schedule_alpha",
           "flow_beta_schedule_beta"), groups.timesteps),
    Group(("loss_type", "huber_c", "huber_schedule"), groups.losses),
    Group(("use_ema", "ema_decay", "ema_update_interval", "ema_device", "ema_cpu_only",
           "ema_foreach_disable", "ema_validation"), groups.ema),
    Group(("offset_noise", "noise_offset", "noise_offset_probability"), groups.noise),
    Group(("report_to",), groups.logs),
    Group(("validation_num_video_frames", "validation_num_inference_steps", "validation_guidance",
           "validation_seed", "validation_negative_prompt", "validation_resolution",
           "validation_disable", "validation_step_interval", "validation_steps",
           "validation_epoch_interval", "validation_prompt", "user_prompt_library",
           "validation_on_startup"), groups.samples),
    Group(("checkpoint_step_interval", "checkpointing_steps", "checkpoints_total_limit",
           "checkpoint_epoch_interval", "eval_epoch_interval"), groups.saving),
    Group(("output_dir", "lora_format"), groups.names),
    Group(("caption_dropout_probability",), dropout),
    Group(("data_backend_config", "train_batch_size"), datasets, of_dataset=True),
)  # fmt: skip

TABLE = Table("SimpleTuner", RULES, GROUPS, PATTERNS)
