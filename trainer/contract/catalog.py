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
)
LR_SCHEDULES: Registry[Any] = Registry(
    "learning-rate schedule",
    Entry("constant", "trainer.lr_schedules.constant:Constant", "flat after the warm-up"),
    Entry("linear", "trainer.lr_schedules.linear:Linear", "falls in a straight line"),
    Entry("cosine", "trainer.lr_schedules.cosine:Cosine", "falls along half a cosine"),
)
TIMESTEP_SAMPLERS: Registry[Any] = Registry(
    "timestep sampler",
    Entry("uniform", "trainer.timesteps.uniform:Uniform", "flat in sigma"),
    Entry("sigmoid", "trainer.timesteps.sigmoid:Sigmoid", "sigmoid of a normal: mid sigmas"),
    Entry("shift", "trainer.timesteps.shift:Shift", "sigmoid moved towards noise by flow_shift"),
    Entry("logit_normal", "trainer.timesteps.logit_normal:LogitNormal", "normal in the logit"),
)
LOSSES: Registry[Any] = Registry(
    "loss",
    Entry("mse", "trainer.losses.mse:MSE", "squared error of the velocity"),
)
WEIGHTINGS: Registry[Any] = Registry(
    "weighting",
    Entry("none", "trainer.weightings.none:Unweighted", "every sigma counts the same"),
)
TECHNIQUES: Registry[Any] = Registry(
    "technique",
    Entry(
        "contrastive_flow",
        "trainer.techniques.contrastive_flow:ContrastiveFlow",
        "push predictions away from the targets of other samples",
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
