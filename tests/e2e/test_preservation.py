"""What is kept, and where a slider leads, measured on the trained tiny model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from tests.e2e.variant_project import (
    CAPTIONS,
    HEADS,
    VariantProject,
    base_config,
    write_clips,
    write_models,
)
from trainer.adapters import load_adapter
from trainer.adapters.apply import attach
from trainer.models import load_transformer

pytestmark = pytest.mark.slow

KEEPS_CLASS = {"name": "output_preservation", "trigger": "red", "class_word": "blue"}
KEEPS_BLANK = {"name": "blank_prompt_preservation", "blank_share": 0.5}
SLIDER = {
    "name": "concept_slider",
    "positive": "a red field",
    "negative": "waves of blue",
    "target": "a green field at night",
    "slider_scale": 20.0,
}
STEPS = 60


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> VariantProject:
    folder = tmp_path_factory.mktemp("kept")
    model = write_models(folder, "wan2.1-t2v-1.3b", "comfy")
    write_clips(folder / "clips", 3, 5, 32, 32)
    sources = [{"video_directory": "clips", "target_frames": [5]}]
    config = base_config(model, {"general": {"resolution": [32, 32]}, "sources": sources})
    config["distributed"] = {"engine": "local", "device": "cpu"}
    config["optimizer"] = {"learning_rate": 5e-3}
    config["training"] = {"max_steps": STEPS}
    config["checkpoint"] = {"every_steps": 0}
    project = VariantProject(folder, config)
    project.cache()
    return project


def context(project: VariantProject, text: str) -> Tensor:
    """Return a cached text."""
    for path in (project.folder / "clips").rglob("*.text.safetensors"):
        with safe_open(path, "pt") as entry:
            if entry.metadata()["caption"] == text:
                return load_file(path)["context"]
    raise LookupError(text)


def velocities(
    project: VariantProject, run: str, texts: Sequence[str], strength: float
) -> list[Tensor]:
    """Return what the trained model says to fixed noisy latents, for each text."""
    model = load_transformer(
        project.folder / project.config["model"]["transformer"], config={"num_heads": HEADS}
    )
    attach(model, load_adapter(project.output(run)), strength)
    random = torch.Generator().manual_seed(0)
    noisy = torch.randn(8, 16, 2, 4, 4, generator=random)
    timestep = torch.linspace(300, 950, 8)
    with torch.no_grad():
        return [model(noisy, timestep, [context(project, text)] * 8) for text in texts]


def drift(project: VariantProject, run: str, text: str) -> float:
    (now,), (before,) = (velocities(project, run, [text], strength) for strength in (1.0, 0.0))
    return (now - before).square().mean().item()


def test_what_a_technique_needs_is_cached_or_asked_for(project: VariantProject) -> None:
    techniques = [KEEPS_CLASS]
    refused = project.train("uncached", may_fail=True, techniques=techniques)
    assert refused.code == 2
    assert "'a blue field' is not cached" in refused.words
    assert "menma cache" in refused.words
    (end,) = project.cache(techniques=techniques).of("end")
    assert (end["captions_encoded"], end["encoded"]) == (1, 0)
    assert end["unneeded"] == 0
    # A config without it finds its cache as before, and leaves the text to the other one.
    (end,) = project.cache().of("end")
    assert (end["captions_encoded"], end["unneeded"]) == (0, 0)
    project.train("cached", techniques=techniques, training__max_steps=1)
    unknown = [KEEPS_CLASS | {"trigger": "purple"}]
    for job in ("cache", "train"):
        config = project.write("unknown.toml", techniques=unknown)
        done = project.job(job, may_fail=True, config=config)
        assert done.code == 2
        assert "no caption of the dataset has the trigger 'purple'" in done.words


def test_the_class_and_the_blank_prompt_stay_what_they_were(project: VariantProject) -> None:
    options: dict[str, Any] = {"dataset__general": {"resolution": [32, 32]}}
    techniques = [KEEPS_CLASS | {"class_share": 0.5}, KEEPS_BLANK]
    project.cache(techniques=techniques)
    project.train("free", **options)
    kept = project.train("keeping", techniques=techniques, **options)
    shown = [batch.captions[0] for _, batch in kept.steps]
    assert {"", "a blue field", *CAPTIONS} == set(shown)
    for text in ("", "a blue field"):
        assert drift(project, "keeping", text) < 0.6 * drift(project, "free", text), text
    learned = [event["loss"] for event in kept.of("step")]
    assert learned[0] > 0


def test_a_slider_moves_both_ways(project: VariantProject) -> None:
    project.cache(techniques=[SLIDER])
    done = project.train("slider", techniques=[SLIDER])
    assert {batch.captions for _, batch in done.steps} == {
        (SLIDER[which],) for which in ("target", "positive", "negative")
    }, "what was trained, and what the untrained model was asked"
    texts = [SLIDER["target"], SLIDER["positive"], SLIDER["negative"]]
    before, positive, negative = velocities(project, "slider", texts, 0.0)
    wanted = (positive - negative).flatten()
    for strength, sign in ((1.0, 1), (0.5, 1), (-1.0, -1)):
        (now,) = velocities(project, "slider", texts[:1], strength)
        moved = (now - before).flatten()
        assert sign * torch.cosine_similarity(moved, wanted, dim=0).item() > 0.5
