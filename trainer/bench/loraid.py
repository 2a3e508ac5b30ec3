"""What three concepts keep when their LoRAs are merged: slots of LORAID against ordinary LoRAs.

Three patterns that the nano model has never seen, each under a word of its own, are taught to three
LoRAs; then the three are merged into the model. Once the LoRAs are slots, once they change all
layers, with as many parameters. The validation loss is that of clips of each pattern that were not
trained on; the probe `shapes` counts, on generated videos, how often a pattern is there when its
word is, and how often what the model knew is still right.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import tomlkit

from trainer.bench.result import Measurement
from trainer.clipart.scenes import NOVEL_GROUNDS, UNCAPTIONED, random_scene
from trainer.clipart.split import TRAINED, training_scene
from trainer.contract.files import write_text
from trainer.contract.jobs import JOBS, CacheRequest, EvalRequest, TrainRequest
from trainer.contract.lora_use import LoRAUse
from trainer.contract.options import Options
from trainer.jobs.base import Emit
from trainer.jobs.merge import merge_loras
from trainer.nano.files import T2V_VARIANT, asset
from trainer.nano.quality import FLOW_SHIFT, FPS, GUIDANCE_SCALE, NUM_FRAMES, NUM_STEPS, SIZE
from trainer.nano.scene_files import write_scenes

CONCEPTS: Final = tuple(NOVEL_GROUNDS)
KINDS: Final = ("slots", "ordinary")
Figures = Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotPlan:
    """How much is trained and looked at."""

    steps: int = 240
    batch_size: int = 12
    num_clips: int = 12
    """Clips of each concept."""
    num_held_out: int = 8
    """Further clips of each, for the validation loss."""
    num_known: int = 24
    """Clips of what the model knows, trained on beside them."""
    num_shots: int = 16
    """Videos with each concept's word, and as many without any."""
    rank: int = 16
    """Of the ordinary LoRAs."""
    slots: int = 4
    """The fourth stays free. A slot's rank is so many times higher, for as many parameters."""
    seed: int = 0


def measure(plan: SlotPlan | None = None, folder: Path | None = None) -> Measurement:
    """Train, merge and look; minutes on a CPU.

    Args:
        plan: how much.
        folder: for all that is made; None: one that is removed afterwards.
    """
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="menma-slots-") as temporary:
            return measure(plan, Path(temporary))
    plan = plan or SlotPlan()
    bench = _Bench(folder, plan)
    bench.draw()
    alone = {kind: bench.train_each(kind) for kind in KINDS}
    merged = {kind: bench.merge_all(kind) for kind in KINDS}
    lost = {kind: lost_share(alone[kind], merged[kind]) for kind in KINDS}
    return Measurement(
        name="loraid",
        what="share of learning lost when three slots are merged",
        value=lost["slots"],
        unit="ratio",
        limit=None,
        figures={
            "lost_by_ordinary_loras": round(lost["ordinary"], 4),
            "alone": alone,
            "merged": merged,
            "plan": asdict(plan),
        },
    )


class _Bench:
    """The folder, and what is done in it."""

    def __init__(self, folder: Path, plan: SlotPlan) -> None:
        self.folder, self.plan = folder, plan

    def draw(self) -> None:
        """Draw the clips of each concept, and those of what is known."""
        rng = np.random.default_rng((self.plan.seed, 50))
        for concept in CONCEPTS:
            num = self.plan.num_clips
            chosen = rng.permutation(len(TRAINED))[: num + self.plan.num_held_out]
            scenes = [random_scene(rng, TRAINED[number], concept) for number in chosen]
            write_scenes(scenes[:num], self.folder / "clips" / concept)
            write_scenes(scenes[num:], self.folder / "clips" / f"{concept}-held-out")
        known = [training_scene(rng) for _ in range(self.plan.num_known)]
        write_scenes(known, self.folder / "clips" / "known")

    def train_each(self, kind: str) -> dict[str, Figures]:
        """Train a LoRA of each concept; return what each does alone."""
        figures = {}
        for concept in CONCEPTS:
            config = self._write(f"{kind}-{concept}", concept, self._adapter(kind, concept))
            if kind == KINDS[0]:  # the clips are the same ones
                self._job("cache", CacheRequest(config=config))
            self._job("train", TrainRequest(config=config, resume="never"))
            figures[concept] = self._look(config)
        return figures

    def merge_all(self, kind: str) -> dict[str, Figures]:
        """Merge the LoRAs of a kind; return what the model does for each concept."""
        names = [f"{kind}-{concept}" for concept in CONCEPTS]
        files = [self.folder / "runs" / name / "output" / f"{name}.safetensors" for name in names]
        model = self.folder / f"{kind}.safetensors"
        merge_loras(asset("t2v"), [LoRAUse(path=file) for file in files], model)
        return {
            concept: self._look(self._write(f"merged-{kind}-{concept}", concept, {}, model))
            for concept in CONCEPTS
        }

    def _adapter(self, kind: str, concept: str) -> dict[str, Any]:
        plan = self.plan
        if kind == "ordinary":
            return {"rank": plan.rank}
        slot = {"slot": 1 + CONCEPTS.index(concept), "slots": plan.slots, "allocation": "spread"}
        return {"rank": plan.rank * plan.slots, "loraid": slot}

    def _look(self, config: Path) -> Figures:
        """Return the figures of a config's LoRA, or of its model where there is none."""
        found = self._job("eval", EvalRequest(config=config))
        losses = found["validation"]
        figures = {
            "base_validation_loss": losses["base"]["loss"],
            "validation_loss": (losses["trained"] or losses["base"])["loss"],
            **found["probe"]["figures"],
        }
        rounded = {name: round(value, 4) for name, value in figures.items()}
        sys.stderr.write(f"{config.stem}: {rounded}\n")  # minutes lie between one and the next
        return rounded

    def _job(self, name: str, request: Options) -> dict[str, Any]:
        """Run a job in this process, twenty of which take longer to start than to work."""
        end: dict[str, Any] = {}

        def keep_end(kind: str, /, **fields: Any) -> None:
            if kind == "end":
                end.update(fields)

        run = cast("Callable[[Options, Emit], None]", JOBS.load(name))
        run(request, keep_end)
        return end

    def _write(
        self, name: str, concept: str, adapter: Mapping[str, Any], model: Path | None = None
    ) -> Path:
        values = _config(self.folder, self.plan, concept) | {"name": name, "adapter": adapter}
        values["model"]["transformer"] = str(model or asset("t2v"))
        path = self.folder / "configs" / f"{name}.toml"
        write_text(path, tomlkit.dumps(values))
        return path


def _config(folder: Path, plan: SlotPlan, concept: str) -> dict[str, Any]:
    """Return the config of a concept, which is that of `menma demo`."""
    clips = folder / "clips"
    return {
        "model": {
            "variant": T2V_VARIANT,
            "vae": str(asset("vae")),
            "text_encoder": str(asset("text_encoder")),
        },
        "dataset": {
            "general": {"resolution": [SIZE, SIZE], "batch_size": plan.batch_size},
            "sources": [
                {
                    "video_directory": str(clips / concept),
                    "target_frames": [NUM_FRAMES],
                    "num_repeats": 2,
                },
                {"video_directory": str(clips / "known"), "target_frames": [NUM_FRAMES]},
            ],
        },
        "objective": {"timestep_sampler": "logit_normal", "logit_mean": 1.0, "logit_std": 1.4},
        "optimizer": {"kind": "adamw", "learning_rate": 1e-3, "weight_decay": 0.0},
        "lr_schedule": {"kind": "cosine", "warmup_steps": min(20, plan.steps // 4)},
        "training": {"max_steps": plan.steps, "seed": plan.seed},
        "validation": {
            "timesteps": [500, 700, 900],
            "noises_per_timestep": 2,
            "batch_size": 8,
            "sources": [
                {
                    "video_directory": str(clips / f"{concept}-held-out"),
                    "target_frames": [NUM_FRAMES],
                }
            ],
        },
        "probe": {"kind": "shapes", "ground": concept, "num_shots": plan.num_shots},
        "sampling": {
            "negative_prompt": UNCAPTIONED,
            "width": SIZE,
            "height": SIZE,
            "num_frames": NUM_FRAMES,
            "num_steps": NUM_STEPS,
            "guidance_scale": GUIDANCE_SCALE,
            "flow_shift": FLOW_SHIFT,
            "fps": FPS,
        },
        "memory": {
            "weight_format": "fp32",
            "vae_dtype": "fp32",
            "text_encoder_dtype": "fp32",
            "cache_dtype": "fp32",
            "gradient_checkpointing": False,
        },
        "distributed": {"engine": "local", "num_processes": 1},
        "output": {"runs_dir": str(folder / "runs")},
    }


def lost_share(alone: Mapping[str, Figures], merged: Mapping[str, Figures]) -> float:
    """Return what merging takes back of what the LoRAs alone have learned, the concepts' mean.

    Learned is the fall of a concept's validation loss: lost is (merged − alone) / (base − alone).

    Args:
        alone: concept -> figures of its LoRA alone, with `base_validation_loss`.
        merged: concept -> figures of the model that all were merged into.
    """
    shares = [
        (merged[concept]["validation_loss"] - figures["validation_loss"])
        / (figures["base_validation_loss"] - figures["validation_loss"])
        for concept, figures in alone.items()
    ]
    return sum(shares) / len(shares)
