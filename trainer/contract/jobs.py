"""What each job is asked for: the request file of `python -m trainer JOB REQUEST.json`.

The app writes one of these as JSON; the job answers with events (`contract.events`) as JSON lines
on stdout, words on stderr, and an exit code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from trainer.contract.config import Prompt
from trainer.contract.lora_use import LoRAUse, SampleLoRA
from trainer.contract.options import Options
from trainer.contract.registry import Entry, Registry
from trainer.contract.vary import Axis

OutputDtype = Literal["bf16", "fp16", "fp32"]
LoRALayout = Literal["comfy", "kohya", "peft"]


class LoraidUse(Options):
    """One slot of LORAID and how strongly it acts; its file is found by the number."""

    slot: int = Field(ge=1)
    """Number of the slot."""
    strength: float = 1.0
    """Multiplier; 0 leaves the slot out, negative subtracts."""
    expert: Literal["low_noise", "high_noise"] | None = None
    """Wan 2.2: the expert whose file is meant; empty: that of each expert that is used."""


class ConfigRequest(Options):
    """A job that works on a config."""

    config: Path
    """Config file."""
    set: tuple[str, ...] = ()
    """`section.key=value` overrides."""


class CheckRequest(ConfigRequest):
    """Validate config, files and dataset; everything that is wrong at once."""


class CacheRequest(ConfigRequest):
    """Encode clips and captions."""

    prune: bool = False
    """Remove every entry of the cache folders that this config does not need."""
    from_musubi: bool = False
    """Take what musubi-tuner has cached of the clips, where it fits."""
    write_musubi: Path | None = None
    """Write the caches in musubi-tuner's format, too, into this folder."""


class TrainRequest(ConfigRequest):
    """Train, in the run directory of the config."""

    resume: str = "auto"
    """`auto` goes on from the newest whole checkpoint, `never` starts anew, or a path."""


class SampleJobRequest(ConfigRequest):
    """Generate videos or images."""

    loras: tuple[SampleLoRA, ...] = ()
    """LoRAs to use."""
    loraids: tuple[LoraidUse, ...] = ()
    """Slots of LORAID to use."""
    loraid_from: tuple[Path, ...] = ()
    """Files, or folders of files, that hold these slots."""
    merge_loras: bool = False
    """Add the LoRAs to the weights, once; off: they compute beside them, in each step."""
    prompts: tuple[Prompt, ...] = ()
    """What to make; empty: the config's prompts."""
    prompts_file: Path | None = None
    """Prompts in a .txt, .toml or .json file."""
    output: Path = Path("samples")
    """Folder of the results, or a file: its ending says which format, fields in braces are filled
    in, such as {index} and {seed}."""
    force: bool = False
    """Replace files that are there; else a file is refused, and in a folder names count on."""
    run_dir: Path | None = None
    """Take this run's newest output file as a LoRA, too."""
    like: Path | None = None
    """Make this sample again, from what its file says; all that is set here wins. With it, a prompt
    of no words has those of the file."""
    decode: Path | None = None
    """Decode this file of latents, or each one of this folder, and make nothing."""
    calibrate: bool = False
    """Sample without methods of guidance and step cache, and measure what caches need to know."""


class SampleMatrixRequest(SampleJobRequest):
    """Make a sheet: every combination of prompts and of what is varied; finished ones are kept."""

    axes: tuple[Axis, ...] = ()
    """What differs from cell to cell, beside the prompts."""
    columns: str | None = None
    """Key of what differs from left to right; empty: the last that has several values."""


class SampleSessionRequest(SampleJobRequest):
    """Keep the models loaded and make a sample for each line of stdin; see the job."""


class EvalRequest(ConfigRequest):
    """Measure one subject: a run, or a config with the run that it has."""

    run_dir: Path | None = None
    """Run whose newest output file is measured; empty: the config's own run, or the base alone."""
    save: Path | None = None
    """Folder for the videos that the probe looks at; nothing in it is overwritten."""


class DeepSpeedRequest(ConfigRequest):
    """Say what DeepSpeed would be told."""


class ScheduleRequest(ConfigRequest):
    """Say the learning rate of every step."""

    steps: int | None = Field(None, ge=1)
    """Of the run; empty: `training.max_steps`."""


class MergeRequest(Options):
    """Bake LoRAs into a base model, or into both experts of Wan 2.2."""

    base: Path
    """Transformer weights in any known layout; of two experts the low-noise one."""
    base_high_noise: Path | None = None
    """Wan 2.2: weights of the high-noise expert; both experts are written."""
    loras: tuple[LoRAUse, ...] = ()
    """LoRAs to bake in."""
    loraids: tuple[LoraidUse, ...] = ()
    """Slots of LORAID to bake in."""
    loraid_from: tuple[Path, ...] = ()
    """Files, or folders of files, that hold these slots."""
    output: Path
    """File to write; of two experts OUT_high_noise.safetensors and OUT_low_noise.safetensors."""
    dtype: OutputDtype | None = None
    """Precision of the written weights; empty: the base's own."""
    force: bool = False
    """Overwrite the output file."""


class ConvertRequest(Options):
    """Rewrite a LoRA in another layout."""

    input: Path
    """LoRA in any known layout."""
    output: Path
    """File to write."""
    layout: LoRALayout = "comfy"
    """Key layout of the written file."""
    dtype: OutputDtype | None = None
    """Precision of the written factors; empty: the file's own."""
    expert: Literal["low_noise", "high_noise"] | None = None
    """Which part of a file that holds LoRAs for both experts of Wan 2.2."""
    join: Path | None = None
    """The LoRA of the other expert: one file with both is written."""
    split: bool = False
    """Write the two parts of a file with both experts as two files."""
    force: bool = False
    """Overwrite the output file."""


class InspectRequest(Options):
    """Describe a LoRA file."""

    path: Path
    """LoRA in any known layout."""
    expert: Literal["low_noise", "high_noise"] | None = None
    """Which part of a file that holds LoRAs for both experts of Wan 2.2; empty: both."""


class LoRAOutput(Options):
    """How a tool writes the LoRA that it makes."""

    output: Path
    """File to write."""
    layout: LoRALayout | None = None
    """Key layout; empty: that of the first input."""
    dtype: OutputDtype | None = None
    """Precision of the factors; empty: that of the inputs, fp32 where that would round a sum."""
    force: bool = False
    """Overwrite the output."""


class CutOptions(Options):
    """Which singular values of an update are kept; of several limits the tightest counts."""

    rank: int | None = Field(None, ge=1)
    """Not more than this many."""
    energy: float | None = Field(None, gt=0, le=1)
    """The fewest that hold this share of the squared Frobenius norm."""
    frobenius: float | None = Field(None, gt=0, le=1)
    """The fewest that hold this share of the Frobenius norm."""
    ratio: float | None = Field(None, ge=1)
    """Those of at least the largest one / ratio."""


class LoRAMergeRequest(LoRAOutput, CutOptions):
    """Add LoRAs to one LoRA."""

    loras: tuple[LoRAUse, ...] = Field(min_length=1)
    """LoRAs and their strengths."""


class LoRASubtractRequest(LoRAOutput, CutOptions):
    """Take LoRAs out of a model that they were merged into, or out of another LoRA."""

    minuend: Path
    """Base model with the LoRAs merged in, or a LoRA."""
    expert: Literal["low_noise", "high_noise"] | None = None
    """Which part of a LoRA file for both experts of Wan 2.2."""
    loras: tuple[LoRAUse, ...] = Field(min_length=1)
    """LoRAs to take out, and the strengths they were merged with."""


class LoRAResizeRequest(LoRAOutput, CutOptions):
    """Change the rank of a LoRA."""

    input: Path
    """LoRA in any known layout."""
    expert: Literal["low_noise", "high_noise"] | None = None
    """Which part of a file for both experts of Wan 2.2."""


class LoRAExtractRequest(LoRAOutput, CutOptions):
    """Make a LoRA of what two checkpoints of one model differ in."""

    base: Path
    """Transformer weights in any known layout."""
    tuned: Path
    """Weights of the same model after training."""
    allow_partial: bool = False
    """Write the LoRA although it cannot hold everything that differs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the decompositions are computed."""


class LoRAEmaRequest(Options):
    """Average the files that one run saved on its way; their layout is kept."""

    output: Path
    """File to write."""
    dtype: OutputDtype | None = None
    """Precision of the factors; empty: that of the last file."""
    force: bool = False
    """Overwrite the output."""
    files: tuple[Path, ...] = Field(min_length=2)
    """Files of one LoRA after different numbers of steps."""
    beta: float | None = Field(None, ge=0, lt=1)
    """Share of the average so far that each further file keeps."""
    beta2: float | None = Field(None, ge=0, lt=1)
    """The share at the last file; it grows from `beta` in equal steps."""
    sigma_rel: float | None = Field(None, gt=0)
    """Width of the average relative to the length of training; at most 1/√12 = 0.2887."""
    sort: bool = True
    """Order the files by step, else by name; off: as given."""
    exact: bool = False
    """Average the updates instead of the factors, and cut to the rank of the last file."""


class LoRABlendRequest(Options):
    """Let LoRAs take over a share of each other's updates."""

    files: tuple[LoRAUse, ...] = Field(min_length=2)
    """LoRAs, each of which is written again."""
    output: Path
    """Folder of the results, which keep their names."""
    share: float = Field(ge=0, le=1)
    """0 changes nothing, at 1 all become the mean."""
    votes: float = Field(0.0, ge=0, le=16)
    """Weight of a LoRA's update in the mean: its norm to this power. 0: all count alike."""
    groups: dict[Literal["cross", "self", "ffn", "other"], float] = Field(default_factory=dict)
    """Group of layers -> factor on the share there, in [0, 1]; 1 where nothing is said."""
    rank: int | None = Field(None, ge=1)
    """Cut updates to this rank; empty: exact, the ranks add up."""
    layout: LoRALayout | None = None
    """Key layout; empty: each file's own."""
    dtype: OutputDtype | None = None
    """Precision of the factors; empty: each file's own, fp32 where that would round."""
    force: bool = False
    """Overwrite files in the folder."""


class LoraVerifyRequest(Options):
    """Prove that LoRA files do not write to the same matrices."""

    paths: tuple[Path, ...] = Field(min_length=1)
    """LoRA files."""
    expert: Literal["low_noise", "high_noise"] | None = None
    """Which part of files that hold LoRAs for both experts of Wan 2.2."""


class FramesRequest(Options):
    """Write frames of a video, of a folder of images or of an image as small PNG files."""

    path: Path
    """What to look at."""
    output: Path
    """Folder of the pictures, `frame_00000.png` and so on by the number of the frame."""
    num_frames: int = Field(8, ge=1, le=256)
    """How many, evenly spread, first and last among them; a shorter clip gives all it has."""
    frames: tuple[int, ...] = Field((), max_length=256)
    """Frames to write instead, from 0; those below 0 count from the end, -1 is the last."""
    max_width: int = Field(320, ge=1, le=4096)
    """Pixels; the picture keeps its aspect and is never enlarged."""
    max_height: int = Field(320, ge=1, le=4096)
    """Pixels."""


class DataCheckRequest(ConfigRequest):
    """Tell what a dataset will become, clip by clip."""

    output: Path
    """JSON file to write: events are too short for thousands of clips."""
    decode: bool = False
    """Decode every frame of every window, which finds damage that nothing else shows."""


class DataPreviewRequest(ConfigRequest):
    """Draw items as they will be trained."""

    output: Path
    """The contact sheet, a PNG."""
    num_items: int = Field(12, ge=1, le=100)
    """Items on it, evenly spread over the dataset."""
    num_frames: int = Field(6, ge=1, le=24)
    """Frames of each, evenly spread over its window."""
    match: str = ""
    """Only items of clips with this in their name."""
    pictures: Path | None = None
    """Folder to write each frame into, too."""


class DataLatentsRequest(ConfigRequest):
    """Tell whether cached latents look as they should."""

    output: Path
    """JSON file to write."""
    z_limit: float = Field(3.5, gt=0)
    """Items whose mean or spread is further than this from the others' stand out."""


class DemoRequest(Options):
    """Run the whole pipeline on a tiny model."""

    directory: Path = Path("demo")
    """Folder for everything the demo makes."""


class BenchRequest(Options):
    """Measure speed and memory as ratios."""

    names: tuple[str, ...] = ()
    """Benchmarks to run; empty: all."""


class BenchConfigRequest(ConfigRequest):
    """Time a config's training step on random weights and batches, and measure its memory."""

    steps: int = Field(3, ge=1)
    """Steps that are timed."""
    warmup_steps: int = Field(1, ge=0)
    """Steps before them."""


class BenchGridRequest(Options):
    """Time a fixed grid of configs, each in a process of its own."""

    only: tuple[str, ...] = ()
    """Rows whose name has one of these words in it; empty: all."""
    sampling: bool = False
    """Of sampling instead of training."""
    steps: int = Field(3, ge=1)
    """Steps that are timed, a row."""
    warmup_steps: int = Field(1, ge=0)
    """Steps before them."""


class SchemaRequest(Options):
    """Regenerate `schema.json`."""

    check: bool = False
    """Only say whether it is fresh; exit code 1 if not."""


JOBS: Registry[object] = Registry(
    "job",
    Entry("check", "trainer.jobs.check:run", "validate config, files and dataset"),
    Entry("cache", "trainer.jobs.cache_run:run", "encode clips and captions"),
    Entry("train", "trainer.jobs.train:run", "train"),
    Entry("sample", "trainer.jobs.sample_run:run", "generate videos or images"),
    Entry("sample_matrix", "trainer.jobs.sample_matrix:run", "a sheet of samples"),
    Entry("sample_session", "trainer.jobs.sample_session:run", "a sample for each line of stdin"),
    Entry("eval", "trainer.jobs.eval_run:run", "validation loss and figures of a probe"),
    Entry("deepspeed", "trainer.jobs.deepspeed_export:run", "the DeepSpeed config of a run"),
    Entry("schedule", "trainer.jobs.schedule:run", "the learning rate of every step"),
    Entry("merge", "trainer.jobs.lora_tools:run_merge", "bake LoRAs into a base model"),
    Entry("convert", "trainer.jobs.lora_tools:run_convert", "rewrite a LoRA in another layout"),
    Entry("inspect", "trainer.jobs.lora_tools:run_inspect", "describe a LoRA file"),
    Entry("lora_merge", "trainer.jobs.lora_merge:run", "add LoRAs to one LoRA"),
    Entry("lora_subtract", "trainer.jobs.lora_subtract:run", "take LoRAs out again"),
    Entry("lora_resize", "trainer.jobs.lora_resize:run", "change the rank of a LoRA"),
    Entry("lora_extract", "trainer.jobs.lora_extract:run", "a LoRA from two checkpoints"),
    Entry("lora_ema", "trainer.jobs.lora_ema:run", "average the files of one run"),
    Entry("lora_blend", "trainer.jobs.lora_blend:run", "LoRAs share their updates"),
    Entry("lora_verify", "trainer.jobs.lora_verify:run", "whether LoRA files are disjoint"),
    Entry("data_check", "trainer.jobs.data_check:run", "what a dataset will become"),
    Entry("data_preview", "trainer.jobs.data_preview:run", "items as they will be trained"),
    Entry("data_latents", "trainer.jobs.data_latents:run", "figures of cached latents"),
    Entry("frames", "trainer.jobs.frames:run", "frames of a video as small pictures"),
    Entry("demo", "trainer.demo.job:run", "the whole pipeline on a tiny model"),
    Entry("bench", "trainer.bench.job:run", "speed and memory as ratios"),
    Entry("bench_config", "trainer.bench.config_job:run", "time and memory of a config's step"),
    Entry("bench_sampling", "trainer.bench.sampling_job:run", "time and memory of sampling steps"),
    Entry("bench_grid", "trainer.bench.grid:run", "time and memory of a grid of configs"),
    Entry("schema", "trainer.jobs.schema:run", "regenerate schema.json"),
)
"""Each target is `run(request, emit) -> None`; `request` is the class named in `REQUESTS`."""

REQUESTS: dict[str, type[Options]] = {
    "check": CheckRequest,
    "cache": CacheRequest,
    "train": TrainRequest,
    "sample": SampleJobRequest,
    "sample_matrix": SampleMatrixRequest,
    "sample_session": SampleSessionRequest,
    "eval": EvalRequest,
    "deepspeed": DeepSpeedRequest,
    "schedule": ScheduleRequest,
    "merge": MergeRequest,
    "convert": ConvertRequest,
    "inspect": InspectRequest,
    "lora_merge": LoRAMergeRequest,
    "lora_subtract": LoRASubtractRequest,
    "lora_resize": LoRAResizeRequest,
    "lora_extract": LoRAExtractRequest,
    "lora_ema": LoRAEmaRequest,
    "lora_blend": LoRABlendRequest,
    "lora_verify": LoraVerifyRequest,
    "data_check": DataCheckRequest,
    "data_preview": DataPreviewRequest,
    "data_latents": DataLatentsRequest,
    "frames": FramesRequest,
    "demo": DemoRequest,
    "bench": BenchRequest,
    "bench_config": BenchConfigRequest,
    "bench_sampling": BenchConfigRequest,
    "bench_grid": BenchGridRequest,
    "schema": SchemaRequest,
}
