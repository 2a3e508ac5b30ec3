"""The tree of a run's config: one class a TOML section, a docstring under every field.

Plug-ins declare their options beside their code; a `PluginSection` holds the options of the
plug-ins chosen in it. Reading, merging and checking is `config_io`'s work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

from trainer.contract.denoising_options import PromptDenoising, SectionDenoising
from trainer.contract.expert_config import ExpertSection, ExpertsSection
from trainer.contract.hub import MODEL_FIELDS, is_reference, parse_reference
from trainer.contract.intervals import Repeated
from trainer.contract.lora_use import SampleLoRA
from trainer.contract.optimizer_config import EmaSection, LRScheduleSection, OptimizerSection
from trainer.contract.options import Options
from trainer.contract.plugin_section import PluginSection
from trainer.contract.sample_file_options import SampleFiles
from trainer.contract.sample_texts import SampleTexts
from trainer.contract.validation_config import ValidationSection
from trainer.contract.webhook import is_webhook

MAX_SEED = 2**63
"""Seeds of samples are below: generators take 64 bits, and the next prompts count on."""
MAX_FPS = 240
"""Frames a second of a sample's file; encoders of AV1 take no more."""

if TYPE_CHECKING:
    from trainer.contract.dataset_config import DatasetConfig


class ModelSection(Options):
    """Weight files and which model they are."""

    variant: str = "auto"
    """Model variant such as `wan2.1-t2v-1.3b`; `auto` recognises it from the weights."""
    transformer: Path | None = None
    """Transformer weights, file or folder, any known layout. Wan 2.2: the low-noise expert.
    Each file of this section may be of the Hugging Face hub: `hf:owner/repo/file`."""
    transformer_high_noise: Path | None = None
    """Wan 2.2 only: weights of the high-noise expert."""
    expert: Literal["low_noise", "high_noise", "both", "shared"] | None = None
    """Wan 2.2 only: the expert that is trained; `both` trains one adapter for each in turns,
    `shared` one adapter that works in both."""
    expert_boundary: float | None = Field(None, gt=0, lt=1)
    """Wan 2.2 only: sigma at and above which the high-noise expert works, in training, validation
    and samples; empty: the variant's."""
    vae: Path | None = None
    """VAE weights (2.1 or 2.2, recognised). Needed by caching and sampling."""
    text_encoder: Path | None = None
    """umT5-XXL weights. Needed by caching and sampling."""
    tokenizer: Path | None = None
    """Tokenizer file or folder; empty: taken from the text encoder's file or folder."""
    image_encoder: Path | None = None
    """CLIP ViT-H weights; only Wan 2.1 image-to-video models need them."""
    shape: dict[str, int | float | bool] = Field(default_factory=dict)
    """Sizes of a model that is not a released one, e.g. `{num_heads = 4}`."""

    @field_validator(*MODEL_FIELDS)
    @classmethod
    def _known_reference(cls, value: Path | None) -> Path | None:
        if value is not None and is_reference(value):
            return Path(str(parse_reference(value.as_posix())))
        return value


class DatasetSection(Options):
    """Where the clips are: a dataset file, or the same keys inline."""

    file: Path | None = None
    """Dataset TOML in musubi-tuner's schema (`[general]`, `[[datasets]]`)."""
    general: dict[str, Any] = Field(default_factory=dict)
    """Keys that hold for all sources."""
    sources: tuple[dict[str, Any], ...] = ()
    """One table a source: `[[dataset.sources]]`, musubi-tuner's `[[datasets]]`."""

    def load(self) -> DatasetConfig:
        """Return the dataset, from the file or from the inline keys.

        Raises:
            ConfigError: the file is missing or a key is wrong.
        """
        from trainer.contract.dataset_config import load_dataset_file, parse_dataset

        if self.file is not None:
            return load_dataset_file(self.file)
        return parse_dataset({"general": self.general, "datasets": list(self.sources)})


class FrozenAdapter(Options):
    """One adapter that is put on the base and not trained."""

    path: Path
    """File of any known layout and kind."""
    strength: float = 1.0
    """Multiplies its update."""
    expert: Literal["low_noise", "high_noise"] | None = None
    """Wan 2.2: the expert it is put on; empty: each that is used."""


def _path_alone(value: Any) -> Any:
    return {"path": value} if isinstance(value, str | Path) else value


class AdapterSection(PluginSection):
    """What is trained."""

    slots: ClassVar[dict[str, str]] = {"kind": "adapter"}

    kind: str = "lora"
    """Kind of adapter; `none` trains the model's own weights."""
    frozen: tuple[Annotated[FrozenAdapter, BeforeValidator(_path_alone)], ...] = ()
    """`[[adapter.frozen]]`, or a list of files: adapters that are put on the base and not trained.
    They are there in training, validation and samples, and not in the output."""

    def companions(self, expert: str | None) -> tuple[FrozenAdapter, ...]:
        """Return those of `frozen` that are put on a transformer.

        Args:
            expert: which of Wan 2.2 it is; None: a model without experts.
        """
        return tuple(one for one in self.frozen if one.expert in (None, expert))


class ObjectiveSection(PluginSection):
    """How noise is drawn and how the prediction is judged."""

    slots: ClassVar[dict[str, str]] = {
        "timestep_sampler": "timestep_sampler",
        "loss": "loss",
        "weighting": "weighting",
    }

    timestep_sampler: str = "shift"
    """How sigma is drawn for each sample."""
    min_timestep: float | None = Field(None, ge=0, le=1000)
    """Smallest trained timestep (0 clean, 1000 noise); empty: 0, or the expert's bound."""
    max_timestep: float | None = Field(None, ge=0, le=1000)
    """Largest timestep that is trained; empty: 1000, or the expert's range."""
    preserve_distribution_shape: bool = False
    """Keep the draws that are in the range instead of squeezing the whole distribution into it."""
    num_timestep_buckets: Literal["epoch"] | Annotated[int, Field(ge=2)] | None = None
    """Part the distribution into so many equally likely buckets, which items meet in turn; `epoch`:
    as many as an epoch has items. Empty: every item is drawn independently."""
    loss: str = "mse"
    """Pointwise comparison of prediction and target."""
    weighting: str = "none"
    """Weight of the loss as a function of sigma."""

    @field_validator("num_timestep_buckets", mode="wrap")
    @classmethod
    def _one_message(cls, value: Any, check: Callable[[Any], Any]) -> Any:
        try:
            return check(value)
        except ValidationError:  # it has a message for each kind of value that would do
            text = 'should be a number of buckets, 2 or more, or "epoch"'
            raise PydanticCustomError("choice", text) from None


class TrainingSection(Options):
    """Length and repeatability of the run."""

    max_steps: int = Field(1600, ge=1)
    """Weight updates."""
    epochs: int | None = Field(None, ge=1)
    """Passes over the data; when given, it decides instead of `max_steps`."""
    gradient_accumulation_steps: int = Field(1, ge=1)
    """Microbatches per weight update and process."""
    seed: int = Field(42, ge=0)
    """Fixes initial weights, order, noise and dropout."""


class MemorySection(Options):
    """What is kept where, and in which precision."""

    weight_format: Literal["bf16", "fp32", "fp8", "fp8_scaled"] = "bf16"
    """Precision of the transformer's weights and activations; `fp8` and `fp8_scaled` are for the
    frozen linear layers of the blocks (half the memory), everything else is then bf16."""
    fp8_format: Literal["e4m3", "e5m2"] = "e4m3"
    """fp8 weights: 3 bits of mantissa, or 2 with more range."""
    fp8_matmul: bool = False
    """fp8 weights: multiply in fp8, too. Faster on GPUs that can (RTX 40, Hopper), less exact."""
    attention: str = "sdpa"
    """How attention is computed: `sdpa`, `flash2`, `flash3`, `xformers`, `flex`, or `sage`, which
    is for sampling only. All but `sdpa` and `flex` need a package of their own."""
    gradient_checkpointing: Literal["auto"] | bool | Annotated[int, Field(ge=2)] = True
    """Recompute blocks in the backward pass instead of keeping their activations: `true` each one,
    `2` every second one, `3` every third one; `auto`: as few as the estimate lets fit the GPU."""
    keep_attention: bool = False
    """With gradient checkpointing: keep attention outputs, too. Faster; twice its memory."""
    offload_checkpoints: bool = False
    """With gradient checkpointing: what is kept of each block waits for the backward in RAM."""
    feed_forward_chunks: int = Field(1, ge=1, le=64)
    """Compute each block's feed-forward in so many parts of the tokens, recomputed one by one."""
    attention_chunks: int = Field(1, ge=1, le=64)
    """Make each block's attention inputs in so many parts of the tokens, recomputed one by one."""
    compile_blocks: bool = False
    """Compile the blocks with torch.compile. Faster after a slow first step; needs a C compiler."""
    blocks_to_swap: Literal["auto"] | Annotated[int, Field(ge=0)] = 0
    """So many of the transformer's blocks stay in RAM and are copied to the device when their turn
    comes; 0: all are on the device; `auto`: as few as the estimate lets fit the GPU. For LoRA, not
    for full fine-tunes."""
    vae_dtype: Literal["bf16", "fp32"] = "bf16"
    """Precision of the VAE. Norms are computed in fp32 either way."""
    vae_tile: int | None = Field(None, ge=128, multiple_of=32)
    """Encode and decode in square tiles of this many pixels; empty: whole frames."""
    text_encoder_dtype: Literal["bf16", "fp32", "fp8_scaled"] = "bf16"
    """Precision of the text encoder; `fp8_scaled` is for the weights of its linear layers (6.9 GB
    instead of 11.4), everything else is then bf16."""
    text_encoder_device: Literal["same", "cpu"] = "same"
    """Where the text encoder works: on the device of everything else, or on the CPU. Slower there
    by far, and it takes no memory of the GPU."""
    cache_dtype: Literal["bf16", "fp32"] = "bf16"
    """Precision of cached latents and text embeddings."""

    @property
    def automatic(self) -> tuple[str, ...]:
        """Fields that are `auto` and wait for `memory_model.resolve_memory`."""
        fields = ("blocks_to_swap", "gradient_checkpointing")
        return tuple(field for field in fields if getattr(self, field) == "auto")

    @property
    def swapped_blocks(self) -> int:
        """`blocks_to_swap` as a number.

        Raises:
            ValueError: it still is `auto`.
        """
        if self.blocks_to_swap == "auto":
            raise ValueError("memory.blocks_to_swap = auto has not been resolved")
        return self.blocks_to_swap

    @property
    def checkpointed_every(self) -> int:
        """Every so many blocks one is recomputed; 0: none, 1: each.

        Raises:
            ValueError: it still is `auto`.
        """
        if self.gradient_checkpointing == "auto":
            raise ValueError("memory.gradient_checkpointing = auto has not been resolved")
        return int(self.gradient_checkpointing)

    @field_validator("blocks_to_swap", "gradient_checkpointing", mode="wrap")
    @classmethod
    def _one_message(cls, value: Any, check: Callable[[Any], Any], info: ValidationInfo) -> Any:
        try:
            return check(value)
        except ValidationError:  # it has a message for each kind of value that would do
            numbers = "a number of blocks, 0 or more"
            if info.field_name == "gradient_checkpointing":
                numbers = "true, false, or a number of 2 or more"
            raise PydanticCustomError("choice", f'should be {numbers}, or "auto"') from None


class DistributedSection(Options):
    """Processes and how they share the work."""

    engine: Literal["auto", "deepspeed", "local"] = "auto"
    """`auto` is DeepSpeed where it is installed (Linux), else the plain one-process engine."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO: 1 shards optimizer state, 2 gradients too, 3 weights too."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """ZeRO 1 to 3: where the optimizer's state and fp32 masters wait, and where it steps (CPU)."""
    offload_parameters: Literal["none", "cpu", "nvme"] = "none"
    """ZeRO 3: where weights wait that no layer needs right now."""
    nvme_path: Path | None = None
    """Folder on a local SSD for what is offloaded to `nvme`."""
    num_processes: int | None = Field(None, ge=1)
    """Training processes on this machine; empty: one a visible GPU, or one on a CPU."""
    sequence_parallel: int = Field(1, ge=1)
    """So many processes share the tokens of each clip (Ulysses); for clips too long for one GPU."""
    hostfile: Path | None = None
    """Several machines: a file with a line `HOST slots=N` for each; see docs/clusters.md."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to train; `auto` is cuda where there is one."""
    timeout_s: float = Field(1800.0, gt=0)
    """How long a process waits for the others (say, while one samples) before it gives up."""


class CheckpointSection(Repeated):
    """Full training state, to resume from."""

    every_steps: int = Field(500, ge=0)
    """Steps between checkpoints; 0: only at the end and when asked."""
    every_epochs: int = Field(0, ge=0)
    """Epochs between checkpoints, beside those of `every_steps`; 0: epochs do not count."""
    every_minutes: float = Field(0, ge=0)
    """Minutes after which the next step is followed by one, beside the others; 0: time does not
    count."""
    keep_last: int = Field(3, ge=1)
    """How many checkpoints stay on disk."""


class Prompt(PromptDenoising, SampleTexts):
    """One sample; empty fields take `[sampling]`'s, then the variant's values."""

    prompt: str
    """What the sample shall show."""
    negative_prompt: str | None = None
    """What it shall not show; empty: the official negative prompt."""
    width: int | None = Field(None, ge=16)
    """Pixels."""
    height: int | None = Field(None, ge=16)
    """Pixels."""
    num_frames: int | None = Field(None, ge=1)
    """Frames, 4n + 1; 1 makes an image."""
    num_steps: int | None = Field(None, ge=1, le=1000)
    """Solver steps."""
    guidance_scale: float | None = Field(None, ge=0)
    """Classifier-free guidance; 1 switches it off."""
    guidance_scale_high_noise: float | None = Field(None, ge=0)
    """Guidance of Wan 2.2's high-noise expert; empty: `guidance_scale`, then the variant's."""
    flow_shift: float | None = Field(None, gt=0)
    """Shift of the solver's sigmas towards noise."""
    solver: str | None = None
    """Solver: unipc, euler, dpm++, heun or lcm."""
    schedule: str | None = None
    """Where the steps are: training_grid, full_range, full_range_cut, beta; empty: the solver's."""
    seed: int | None = Field(None, ge=0, lt=MAX_SEED)
    """Fixes the noise."""
    image: Path | None = None
    """First frame, for image-to-video models."""
    last_image: Path | None = None
    """Last frame, for first-last-frame models."""
    control: Path | None = None
    """Control video or folder of frames, for Fun-Control models."""
    video: Path | None = None
    """Video, folder of frames or image to start from instead of noise alone."""
    strength: float | None = Field(None, gt=0, le=1)
    """With `video`: share of the steps that is walked; 1 keeps nothing of it. Empty: 0.8."""
    one_frame: str | None = None
    """One picture at a moment of a clip, `target_index=1,control_index=0;2` in latent frames, for
    image-to-video and first-last-frame models."""
    control_images: tuple[Path, ...] | None = None
    """With `one_frame`: a picture for each control_index."""
    fps: int | None = Field(None, ge=1, le=MAX_FPS)
    """Frames a second of the written video."""
    name: str | None = Field(None, min_length=1, max_length=80)
    """Short name: in the file's name, and as a heading of sheets."""


class SamplingSection(SectionDenoising, SampleFiles, SampleTexts, Repeated):
    """Samples made during training; the same keys are the defaults of `menma sample`."""

    every_steps: int = Field(0, ge=0)
    """Steps between samples; 0: none."""
    every_epochs: int = Field(0, ge=0)
    """Epochs between samples, beside those of `every_steps`; 0: epochs do not count."""
    at_start: bool = False
    """Sample before the first step, too."""
    prompts: tuple[Prompt, ...] = ()
    """`[[sampling.prompts]]`: what to sample."""
    prompts_file: Path | None = None
    """Prompts in a .txt (musubi-tuner's flags), .toml or .json file instead."""
    loras: tuple[SampleLoRA, ...] = ()
    """`[[sampling.loras]]`: LoRAs of `menma sample`, before those of its command line. Samples
    that a training makes do without them: they show what is trained."""
    text_cache: Path | None = None
    """Folder where encoded prompts are kept, so that the text encoder is not loaded for a text
    that it has encoded before; empty: nothing is kept."""
    wildcards: bool = False
    """Choose among `{a|b|c}` and replace `__name__` in prompts, by the seed; off: braces stay."""
    wildcards_folder: Path = Path("wildcards")
    """Where `__name__` is looked up: a line of `name.txt` in this folder."""
    negative_prompt: str | None = None
    """Default of the prompts; empty: the official negative prompt."""
    width: int | None = Field(None, ge=16)
    """Default of the prompts; empty: the variant's."""
    height: int | None = Field(None, ge=16)
    """Default of the prompts; empty: the variant's."""
    num_frames: int | None = Field(None, ge=1)
    """Default of the prompts; empty: the variant's."""
    num_steps: int | None = Field(None, ge=1, le=1000)
    """Default of the prompts; empty: the variant's."""
    guidance_scale: float | None = Field(None, ge=0)
    """Default of the prompts; empty: the variant's."""
    guidance_scale_high_noise: float | None = Field(None, ge=0)
    """Default of the prompts; empty: `guidance_scale`, then the variant's."""
    flow_shift: float | None = Field(None, gt=0)
    """Default of the prompts; empty: the variant's."""
    solver: str = "unipc"
    """Default of the prompts: unipc, euler, dpm++, heun or lcm."""
    schedule: str = ""
    """Default of the prompts: training_grid, full_range, full_range_cut, beta; empty: the solver's
    own."""
    seed: int = Field(42, ge=0, lt=MAX_SEED)
    """Seed of the first prompt; the next prompts count on from it."""

    @property
    def while_training(self) -> bool:
        """Whether a run makes samples without being asked."""
        return self.repeats or self.at_start

    fps: int | None = Field(None, ge=1, le=MAX_FPS)
    """Frames a second of the written video; empty: the variant's."""


class ProbeSection(PluginSection):
    """Measurements on generated videos that `menma eval` makes."""

    slots: ClassVar[dict[str, str]] = {"kind": "probe"}

    kind: str = "none"
    """What is measured."""


class OutputSection(Repeated):
    """What people take away."""

    runs_dir: Path = Path("runs")
    """Folder of the run directories."""
    every_steps: int = Field(0, ge=0)
    """Steps between output files `<name>-step00000500.safetensors`; 0: only the final one."""
    every_epochs: int = Field(0, ge=0)
    """Epochs between output files, beside those of `every_steps`; 0: epochs do not count."""
    keep_last: int | None = Field(None, ge=1)
    """How many of the output files on the way stay on disk, of each kind; empty: all."""
    layout: Literal["comfy", "kohya", "peft"] = "comfy"
    """`comfy` loads in ComfyUI and diffusers; `kohya` is musubi-tuner's; `peft` is diffusers'."""
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Precision of the output file."""
    title: str = ""
    """Title in the file's metadata; empty: the run's name."""
    author: str = ""
    """Author in the file's metadata."""
    description: str = ""
    """Description in the file's metadata."""
    license: str = ""
    """License in the file's metadata."""
    tags: tuple[str, ...] = ()
    """Tags in the file's metadata."""


class LoggingSection(Options):
    """Where figures go besides `events.jsonl`, and who is told of the end."""

    tensorboard: bool = False
    """Write TensorBoard files into the run directory (needs the `logging` extra)."""

    wandb: bool = False
    """Send figures to Weights & Biases (needs `pip install wandb`). The key comes from `wandb
    login` or WANDB_API_KEY; without a network set `wandb_mode` and use `wandb sync` later."""

    wandb_project: str = Field(default="menma", min_length=1)
    """Project that the run is filed under."""

    wandb_entity: str | None = None
    """User or team; none: the default one of the account."""

    wandb_mode: Literal["online", "offline"] = "online"
    """Whether figures are sent at once, or kept in the run directory."""

    details_every_steps: int = Field(default=50, ge=0)
    """How often the mean loss of each source and of each tenth of the timesteps since the last time
    is told; 0: never."""

    weight_norms_every_steps: int = Field(default=0, ge=0)
    """How often the norms of the trained weights are told (all, mean and largest of one tensor);
    each time they are copied to the CPU. 0: never."""

    webhook: str | None = None
    """URL that is told when the run ends: `https://…`, or `env:NAME` for the environment variable
    NAME, which keeps an address that is a secret out of the config. Slack, Discord and others take
    what is sent."""

    webhook_on: tuple[Literal["done", "stopped", "failed"], ...] = ("done", "failed")
    """Ends that are told."""

    @field_validator("webhook")
    @classmethod
    def _known_webhook(cls, value: str | None) -> str | None:
        if value is not None and not is_webhook(value):
            raise ValueError("an address that starts with https:// or http://, or env:NAME")
        return value


class TechniqueSection(PluginSection):
    """One optional behaviour of the training step."""

    slots: ClassVar[dict[str, str]] = {"name": "technique"}

    name: str
    """Technique."""


class RunConfig(Options):
    """Everything that defines a run."""

    name: str = Field("lora", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """Name of the run; it writes into `<runs_dir>/<name>`."""
    preset: str | None = None
    """Preset whose values stand below this file's."""
    model: ModelSection = ModelSection()
    """Weight files."""
    dataset: DatasetSection = DatasetSection()
    """Clips and captions."""
    adapter: AdapterSection = AdapterSection()
    """What is trained."""
    objective: ObjectiveSection = ObjectiveSection()
    """Noise and loss."""
    experts: ExpertsSection = ExpertsSection()
    """Turns of Wan 2.2's experts."""
    high_noise: ExpertSection = ExpertSection()
    """What is special to the high-noise expert."""
    low_noise: ExpertSection = ExpertSection()
    """What is special to the low-noise expert."""
    optimizer: OptimizerSection = OptimizerSection()
    """Updates."""
    lr_schedule: LRScheduleSection = LRScheduleSection()
    """Learning rate over time."""
    ema: EmaSection = EmaSection()
    """Average of the weights."""
    training: TrainingSection = TrainingSection()
    """Length and seed."""
    memory: MemorySection = MemorySection()
    """Precision and memory."""
    distributed: DistributedSection = DistributedSection()
    """Engine and processes."""
    checkpoint: CheckpointSection = CheckpointSection()
    """State to resume from."""
    sampling: SamplingSection = SamplingSection()
    """Samples."""
    validation: ValidationSection = ValidationSection()
    """Loss on clips that are not trained on."""
    probe: ProbeSection = ProbeSection()
    """Measurements on generated videos."""
    output: OutputSection = OutputSection()
    """Output files."""
    logging: LoggingSection = LoggingSection()
    """Logs."""
    techniques: tuple[TechniqueSection, ...] = ()
    """`[[techniques]]`: optional behaviour, in this order."""

    @property
    def run_dir(self) -> Path:
        """Folder of this run."""
        return self.output.runs_dir / self.name

    def load_all_sources(self) -> DatasetConfig:
        """Return the dataset with `validation.sources` after its own sources.

        Both are cached together, so that no source takes another one's place in an index.

        Raises:
            ConfigError: the dataset file is missing or a key is wrong.
        """
        dataset = self.dataset.load()
        own = self.validation.load_sources(dataset.general)
        return dataset.model_copy(update={"sources": (*dataset.sources, *own)})


def load_config(path: Path | str, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a config file and check it completely (a public seam).

    Args:
        path: TOML file.
        overrides: `section.key=value` strings; they win over everything else.

    Raises:
        ConfigError: with all problems at once in `.problems`.
    """
    from trainer.contract import config_io  # it needs this module's classes

    return config_io.load_config(path, overrides)
