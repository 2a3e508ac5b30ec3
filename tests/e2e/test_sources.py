"""Masks, weights of sources and captions in turns, from the files to the trained weights."""

from __future__ import annotations

import subprocess
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.e2e.project import command, environment
from tests.e2e.variant_project import (
    HEADS,
    Done,
    VariantProject,
    base_config,
    draw_frames,
    write_frame_folder,
    write_models,
)
from trainer.adapters import load_adapter
from trainer.adapters.apply import attach
from trainer.contract.events import EventReader
from trainer.models import load_transformer

pytestmark = pytest.mark.slow

VARIANT = "wan2.1-t2v-1.3b"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> VariantProject:
    """Clips with half a mask beside images of a weight of their own."""
    folder = tmp_path_factory.mktemp("sources")
    for index in range(2):
        write_frame_folder(folder / f"clips/{index}", draw_frames(index, 9, 32, 32))
        (folder / f"clips/{index}.txt").write_text("a red field, a green field, waves of blue")
        mask = np.zeros((32, 32), np.uint8)
        mask[:, :16] = 255
        (folder / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(folder / f"masks/{index}.png")
        (folder / "images").mkdir(exist_ok=True)
        Image.fromarray(draw_frames(9 + index, 1, 32, 32)[0]).save(folder / f"images/{index}.png")
        (folder / f"images/{index}.txt").write_text("a red field")
    clips = {
        "video_directory": "clips",
        "target_frames": [5],
        "frame_extraction": "random",
        "frame_sample": 3,
        "mask_directory": "masks",
        "shuffle_tags": True,
        "caption_variants": 3,
    }
    images = {"image_directory": "images", "loss_weight": 0.25}
    general = {"resolution": [32, 32], "trigger_words": ["ohwx"]}
    dataset = {"general": general, "sources": [clips, images]}
    config = base_config(write_models(folder, VARIANT, "official"), dataset)
    config["distributed"]["engine"] = "local"
    return VariantProject(folder, config)


def technique(**options: Any) -> dict[str, Any]:
    return {"techniques": [{"name": "masked_loss", **options}]}


def velocities(project: VariantProject, done: Done, run: str | None) -> list[Tensor]:
    """Return what the model predicts of the inputs of a run, with the LoRA of `run` or without."""
    model = load_transformer(
        project.folder / project.config["model"]["transformer"],
        VARIANT,
        config={"num_heads": HEADS},
    )
    if run is not None:
        attach(model, load_adapter(project.output(run)))
    found = []
    for noisy, batch in done.steps:
        sigma = noisy.sigma_B.view(-1, 1, 1, 1, 1)
        mixed = (1 - sigma) * batch.latents_BCFHW + sigma * noisy.noise_BCFHW
        with torch.no_grad():
            found.append(model(mixed, 1000 * noisy.sigma_B, batch.context, **batch.conditioning))
    return found


def test_masks_weights_windows_and_captions_reach_the_training(project: VariantProject) -> None:
    (end,) = project.cache().of("end")
    assert end["num_problems"] == 0
    assert end["buckets"] == {"32x32x5": 2 * 3, "32x32x1": 2}
    assert end["captions_encoded"] == 3 + 1 + 1, "three orders, the images' and the empty one"
    (checked,) = project.job("check", config=project.write(**technique())).of("end")
    assert checked["batches_per_epoch"] == 4, "one window of each clip, and two images"

    drifts = {}
    for name, options in (("free", {}), ("held", {"prior_weight": 20.0})):
        done = project.train(name, training__epochs=3, **technique(**options))
        # The untrained model is asked of the same batch first.
        done.steps = [done.steps[n] for n in range(len(done.steps)) if not _asked_again(done, n)]
        assert len(done.steps) == 12
        base, after = velocities(project, done, None), velocities(project, done, name)
        first = _loss_by_hand(done, base)
        assert done.of("step")[0]["loss"] == pytest.approx(first, rel=1e-4)
        drifts[name] = _outside(done, base, after)
    assert drifts["held"] < 0.5 * drifts["free"]

    windows: dict[str, list[str]] = {}
    for _, batch in done.steps:
        assert (batch.mask_B1FHW is None) == (batch.latents_BCFHW.shape[2] == 1)
        weight = None if batch.loss_weight_B is None else batch.loss_weight_B.item()
        assert weight == (0.25 if batch.latents_BCFHW.shape[2] == 1 else None)
        if batch.mask_B1FHW is not None:
            clip, _, window = batch.names[0].partition(" ")
            windows.setdefault(clip, []).append(window)
    assert all(sorted(seen) == ["[0:5]", "[2:7]", "[4:9]"] for seen in windows.values())


def _asked_again(done: Done, number: int) -> bool:
    following = done.steps[number + 1 : number + 2]
    return bool(following) and following[0][1] is done.steps[number][1]


def _loss_by_hand(done: Done, base: list[Tensor]) -> float:
    """Return the loss of the first step, in which the adapter does nothing yet."""
    noisy, batch = done.steps[0]
    target = noisy.noise_BCFHW.double() - batch.latents_BCFHW.double()
    squares = (base[0].double() - target).square()
    if batch.mask_B1FHW is None:
        return 0.25 * squares.mean().item()
    return squares[..., :2].mean().item()  # the left half; the prior is fulfilled


def _outside(done: Done, before: list[Tensor], after: list[Tensor]) -> float:
    """Return how far the velocity of clips has moved outside of their masks."""
    return sum(
        (one - other)[..., 2:].square().mean().item()
        for one, other, (_, batch) in zip(before, after, done.steps, strict=True)
        if batch.mask_B1FHW is not None
    )


@pytest.mark.parametrize(
    "sections",
    [
        {"distributed__engine": "deepspeed"},
        {"distributed__engine": "deepspeed", "distributed__zero_stage": 3},
        {"memory__blocks_to_swap": 1},
    ],
    ids=["deepspeed", "zero3", "swap"],
)
def test_a_black_mask_with_a_prior_changes_nothing(
    project: VariantProject, sections: dict[str, Any]
) -> None:
    """Prediction and target are the same numbers, wherever the untrained model's come from."""
    masks = project.folder / "black"
    masks.mkdir(exist_ok=True)
    for index in range(2):
        Image.new("L", (32, 32)).save(masks / f"{index}.png")
    source = {"video_directory": "clips", "target_frames": [5], "mask_directory": "black"}
    dataset = {"dataset__sources": [source], "training__max_steps": 2}
    project.cache(**dataset)
    name = "-".join(str(value) for value in sections.values())
    done = project.train(name, **dataset, **sections, **technique(prior_weight=1.0))
    assert [event["loss"] for event in done.of("step")] == [0, 0]
    assert all(not pair.up_OR.any() for pair in load_adapter(project.output(name)).values())


def test_processes_that_share_weights_run_as_many_forwards(project: VariantProject) -> None:
    """The untrained model is asked for clips with masks and chosen items alone: ZeRO-3 is ZeRO-0.

    The two processes have different batches in each step, of which often one asks and one does not.
    """
    techniques = [
        {"name": "masked_loss", "prior_weight": 2.0},
        {"name": "blank_prompt_preservation", "blank_share": 0.5},
        {"name": "output_preservation", "trigger": "red", "class_word": "a", "class_share": 0.5},
    ]
    options = {"techniques": techniques, "training__max_steps": 8}
    options |= {"distributed__engine": "deepspeed", "distributed__num_processes": 2}
    project.cache(techniques=techniques)
    losses = []
    for stage in (0, 3):
        name = f"share{stage}"
        config = project.write(f"{name}.toml", name=name, distributed__zero_stage=stage, **options)
        done = subprocess.run(
            command(["train", config]),
            cwd=project.folder,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        events = EventReader(project.run(name).events).read()
        losses.append([event["loss"] for event in events if event["type"] == "step"])
    assert len(losses[0]) == 8
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_masks_that_nothing_uses_and_techniques_without_masks_are_refused(
    project: VariantProject,
) -> None:
    unused = project.train("unused", may_fail=True)
    assert unused.code == 2
    assert 'name = "masked_loss"' in unused.words
    checked = project.job("check", may_fail=True, config=project.write())
    assert "the dataset has masks, and nothing uses them" in checked.words
    source = {"video_directory": "clips", "target_frames": [5]}
    idle = {"dataset__sources": [source], **technique()}
    checked = project.job("check", may_fail=True, config=project.write(**idle))
    assert "no clip of the dataset has one" in checked.words
