"""Every name a user may write, on one screen. Imports no implementation."""

from __future__ import annotations

from typing import Any

from trainer.contract.registry import Entry, Registry

ADAPTERS: Registry[Any] = Registry(
    "adapter",
    Entry("lora", "trainer.adapters.lora:LoRA", "low-rank update of the block linears"),
    Entry("tlora", "trainer.adapters.tlora:TLoRA", "LoRA whose rank falls with the noise"),
    Entry("singlora", "trainer.adapters.singlora:SingLoRA", "low-rank update of one matrix, A Aᵀ"),
    Entry("relora", "trainer.adapters.relora:ReLoRA", "LoRAs one after the other, kept as one"),
    Entry("ggpo", "trainer.adapters.ggpo:GGPO", "LoRA under noise, for flat minima"),
    Entry("vera", "trainer.adapters.vera:VeRA", "two vectors a layer on shared random matrices"),
    Entry("loha", "trainer.adapters.loha:LoHa", "elementwise product of two low-rank updates"),
    Entry("lokr", "trainer.adapters.lokr:LoKr", "Kronecker product of two small matrices"),
    Entry("dora", "trainer.adapters.dora:DoRA", "low-rank directions, lengths of their own"),
    Entry(
        "none", "trainer.adapters.full:FullFineTune", "no adapter: train the model's own weights"
    ),
)
OPTIMIZERS: Registry[Any] = Registry(
    "optimizer",
    Entry("adamw", "trainer.optimizers.adamw:AdamW", "Adam with decoupled weight decay"),
    Entry("adamw8bit", "trainer.optimizers.adamw8bit:AdamW8bit", "AdamW with 8-bit states"),
    Entry("adamw_bf16", "trainer.optimizers.adamw_bf16:AdamWBf16", "AdamW on weights in bf16"),
    Entry(
        "deepspeed_cpu_adam",
        "trainer.optimizers.deepspeed_cpu_adam:DeepSpeedCPUAdam",
        "AdamW of an offloaded optimizer, compiled for the CPU",
    ),
    Entry("lion", "trainer.optimizers.lion:Lion", "the sign of a mean of gradients"),
    Entry("lion8bit", "trainer.optimizers.lion8bit:Lion8bit", "Lion with an 8-bit state"),
    Entry("adafactor", "trainer.optimizers.adafactor:Adafactor", "next to no state"),
    Entry("came", "trainer.optimizers.came:CAME", "Adafactor with a mean of updates"),
    Entry("prodigy", "trainer.optimizers.prodigy:Prodigy", "Adam that finds its step size"),
    Entry(
        "schedulefree",
        "trainer.optimizers.schedulefree:ScheduleFree",
        "AdamW that averages weights instead of lowering the rate",
    ),
    Entry("muon", "trainer.optimizers.muon:Muon", "orthogonal updates of matrices"),
    Entry("soap", "trainer.optimizers.soap:SOAP", "Adam in the eigenbasis of Shampoo"),
    Entry("sophia", "trainer.optimizers.sophia:Sophia", "steps clipped by curvature"),
    Entry("scion", "trainer.optimizers.scion:Scion", "steps of a fixed norm"),
    Entry("automagic", "trainer.optimizers.automagic:Automagic", "a learning rate for each weight"),
    Entry("custom", "trainer.optimizers.custom:Custom", "a class of an installed package"),
)
LR_SCHEDULES: Registry[Any] = Registry(
    "learning-rate schedule",
    Entry("constant", "trainer.lr_schedules.constant:Constant", "flat after the warm-up"),
    Entry("linear", "trainer.lr_schedules.linear:Linear", "falls in a straight line"),
    Entry("cosine", "trainer.lr_schedules.cosine:Cosine", "falls along half a cosine"),
    Entry(
        "cosine_restarts",
        "trainer.lr_schedules.cosine_restarts:CosineRestarts",
        "half a cosine several times",
    ),
    Entry("polynomial", "trainer.lr_schedules.polynomial:Polynomial", "falls as a power"),
    Entry("inverse_sqrt", "trainer.lr_schedules.inverse_sqrt:InverseSqrt", "falls as 1/√step"),
    Entry(
        "warmup_stable_decay",
        "trainer.lr_schedules.warmup_stable_decay:WarmupStableDecay",
        "flat, then a short fall at the end",
    ),
    Entry("rex", "trainer.lr_schedules.rex:Rex", "falls late, by a ratio of lines"),
    Entry("plateau", "trainer.lr_schedules.plateau:Plateau", "falls when the loss stops to fall"),
    Entry("piecewise", "trainer.lr_schedules.piecewise:Piecewise", "through points of your own"),
    Entry("custom", "trainer.lr_schedules.custom:Custom", "a class of an installed package"),
)
TIMESTEP_SAMPLERS: Registry[Any] = Registry(
    "timestep sampler",
    Entry("uniform", "trainer.timesteps.uniform:Uniform", "flat in sigma"),
    Entry("sigmoid", "trainer.timesteps.sigmoid:Sigmoid", "sigmoid of a normal: mid sigmas"),
    Entry("shift", "trainer.timesteps.shift:Shift", "sigmoid moved towards noise by flow_shift"),
    Entry("logit_normal", "trainer.timesteps.logit_normal:LogitNormal", "normal in the logit"),
    Entry("flux_shift", "trainer.timesteps.flux_shift:FluxShift", "shift by a frame's size"),
    Entry("qwen_shift", "trainer.timesteps.qwen_shift:QwenShift", "the same, gentler"),
    Entry("logsnr", "trainer.timesteps.logsnr:LogSNR", "normal in ln SNR: very noisy, for styles"),
    Entry(
        "qinglong_flux",
        "trainer.timesteps.qinglong_flux:QinglongFlux",
        "flux_shift with some very noisy and some nearly clean",
    ),
    Entry(
        "qinglong_qwen",
        "trainer.timesteps.qinglong_qwen:QinglongQwen",
        "qwen_shift with some nearly clean",
    ),
    Entry("mode", "trainer.timesteps.mode:Mode", "the middle or both ends, none ever rare"),
    Entry("bell", "trainer.timesteps.bell:Bell", "a bell over sigma"),
    Entry("half_bell", "trainer.timesteps.half_bell:HalfBell", "a rising bell, flat towards noise"),
    Entry("content", "trainer.timesteps.content:Content", "cubic towards noise: composition"),
    Entry("style", "trainer.timesteps.style:Style", "cubic towards clean latents: detail"),
)
LOSSES: Registry[Any] = Registry(
    "loss",
    Entry("mse", "trainer.losses.mse:MSE", "squared error of the velocity"),
    Entry("l1", "trainer.losses.l1:L1", "absolute error"),
    Entry("huber", "trainer.losses.huber:Huber", "squared up to a size, then absolute"),
    Entry("pseudo_huber", "trainer.losses.pseudo_huber:PseudoHuber", "the same without a corner"),
)
WEIGHTINGS: Registry[Any] = Registry(
    "weighting",
    Entry("none", "trainer.weightings.none:Unweighted", "every sigma counts the same"),
    Entry("sigma_sqrt", "trainer.weightings.sigma_sqrt:SigmaSqrt", "1 / sigma²: clean latents"),
    Entry("cosmap", "trainer.weightings.cosmap:CosMap", "the middle, at most twice the ends"),
    Entry("bell", "trainer.weightings.bell:BellWeight", "a bell over sigma"),
    Entry("min_snr", "trainer.weightings.min_snr:MinSNR", "signal-to-noise ratio, cut at gamma"),
)
TECHNIQUES: Registry[Any] = Registry(
    "technique",
    Entry(
        "contrastive_flow",
        "trainer.techniques.contrastive_flow:ContrastiveFlow",
        "push predictions away from the targets of other samples",
    ),
    Entry(
        "immiscible_noise",
        "trainer.techniques.immiscible_noise:ImmiscibleNoise",
        "mix each sample with the nearest of several noises",
    ),
    Entry(
        "noise_offset",
        "trainer.techniques.noise_offset:NoiseOffset",
        "noise that moves each channel as a whole",
    ),
    Entry(
        "pyramid_noise",
        "trainer.techniques.pyramid_noise:PyramidNoise",
        "noise of several resolutions",
    ),
    Entry(
        "blank_prompt_preservation",
        "trainer.techniques.blank_prompt_preservation:BlankPromptPreservation",
        "keep what the model makes of an empty prompt",
    ),
    Entry(
        "output_preservation",
        "trainer.techniques.output_preservation:OutputPreservation",
        "a trigger word learns, its class stays what it was",
    ),
    Entry(
        "concept_slider",
        "trainer.techniques.concept_slider:ConceptSlider",
        "from one description towards another, by the adapter's strength",
    ),
    Entry(
        "text_token_dropout",
        "trainer.techniques.text_token_dropout:TextTokenDropout",
        "leave out text tokens at random",
    ),
    Entry(
        "masked_loss",
        "trainer.techniques.masked_loss:MaskedLoss",
        "learn what a mask marks, and keep the rest as it was",
    ),
)
ATTENTION: Registry[Any] = Registry(
    "attention",
    Entry("sdpa", "trainer.attention.sdpa:TorchAttention", "torch picks the kernel"),
    Entry("flash2", "trainer.attention.flash2:Flash2Attention", "package flash-attn"),
    Entry("flash3", "trainer.attention.flash3:Flash3Attention", "Hopper GPUs, flash-attn-3"),
    Entry("xformers", "trainer.attention.xformers:XformersAttention", "package xformers"),
    Entry("sage", "trainer.attention.sage:SageAttention", "8-bit, sampling only"),
    Entry("flex", "trainer.attention.flex:FlexAttention", "a kernel made for the text's bias"),
)
SOLVERS: Registry[Any] = Registry(
    "solver",
    Entry("unipc", "trainer.sampling.solvers.unipc:UniPC", "second-order predictor-corrector"),
    Entry("euler", "trainer.sampling.solvers.euler:Euler", "one straight line a step"),
    Entry("dpm++", "trainer.sampling.solvers.dpmpp:DPMpp2M", "second-order multistep"),
    Entry("heun", "trainer.sampling.solvers.heun:Heun", "second order, two evaluations a step"),
    Entry("lcm", "trainer.sampling.solvers.lcm:LCM", "new noise a step, for few-step models"),
)
SCHEDULES: Registry[Any] = Registry(
    "schedule",
    Entry(
        "training_grid",
        "trainer.sampling.schedule:training_grid_schedule",
        "even from 0.999, integer timesteps; unipc's own",
    ),
    Entry(
        "full_range",
        "trainer.sampling.schedule:full_range_schedule",
        "even from 1; euler's, heun's and lcm's own",
    ),
    Entry(
        "full_range_cut",
        "trainer.sampling.schedule:full_range_cut_schedule",
        "even from 1, integer timesteps; dpm++'s own",
    ),
    Entry("beta", "trainer.sampling.schedule:beta_schedule", "from 1, dense at both ends"),
)
GUIDANCE_METHODS: Registry[Any] = Registry(
    "guidance method",
    Entry("cfg_skip", "trainer.sampling.guidance_methods.cfg_skip:CFGSkip", "steps without it"),
    Entry(
        "cfg_zero_star",
        "trainer.sampling.guidance_methods.cfg_zero_star:CFGZeroStar",
        "the negative prediction in its best scale",
    ),
    Entry(
        "skip_layers",
        "trainer.sampling.guidance_methods.skip_layers:SkipLayers",
        "away from the model without some blocks",
    ),
    Entry(
        "rescale",
        "trainer.sampling.guidance_methods.rescale:Rescale",
        "the spread of the prompt's prediction",
    ),
)
"""They work in this order; options of `contract.denoising_options` switch them on."""
STEP_CACHES: Registry[Any] = Registry(
    "step cache",
    Entry(
        "teacache",
        "trainer.sampling.step_cache.teacache:TeaCache",
        "by how far the timestep's embedding moves",
    ),
    Entry(
        "magcache",
        "trainer.sampling.step_cache.magcache:MagCache",
        "by how the size of the blocks' work changes, as calibrated",
    ),
)
PROBES: Registry[Any] = Registry(
    "probe",
    Entry("none", "trainer.probes.none:NoProbe", "nothing is measured on generated videos"),
    Entry("shapes", "trainer.probes.shapes:Shapes", "new and known shapes of the nano model"),
)

PLUGIN_KINDS: dict[str, Registry[Any]] = {
    "adapter": ADAPTERS,
    "optimizer": OPTIMIZERS,
    "lr_schedule": LR_SCHEDULES,
    "timestep_sampler": TIMESTEP_SAMPLERS,
    "loss": LOSSES,
    "weighting": WEIGHTINGS,
    "technique": TECHNIQUES,
    "probe": PROBES,
}
"""Kinds whose options a user writes in the config; `schema.json` holds them by these names."""
