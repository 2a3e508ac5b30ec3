"""From config to plug-ins: what only a plug-in knows is refused with the section's key."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trainer.contract.config import RunConfig
from trainer.contract.config_io import load_config
from trainer.contract.errors import ConfigError
from trainer.contract.variants import VARIANTS
from trainer.core.seams import BuildContext, Need
from trainer.jobs import build
from trainer.jobs.build import build_objective, build_techniques, num_processes, pick_device
from trainer.techniques.contrastive_flow import ContrastiveFlow


def config_of(tmp_path: Path, text: str) -> RunConfig:
    path = tmp_path / "c.toml"
    path.write_text(text)
    return load_config(path, environ={})


def context(variant: str = "wan2.2-t2v-a14b") -> BuildContext:
    return BuildContext(
        variant=VARIANTS[variant], seed=0, device=torch.device("cpu"), total_steps=4
    )


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        ("", 0.0, 1.0),
        ("[objective]\nmin_timestep = 100\nmax_timestep = 600\n", 0.1, 0.6),
        ('[model]\nvariant = "wan2.2-t2v-a14b"\nexpert = "high_noise"\n', 0.875, 1.0),
        ('[model]\nvariant = "wan2.2-t2v-a14b"\nexpert = "low_noise"\n', 0.0, 0.875),
        (
            '[model]\nvariant = "wan2.2-t2v-a14b"\nexpert = "high_noise"\n'
            "[objective]\nmin_timestep = 900\n",
            0.9,
            1.0,
        ),
    ],
)
def test_trained_sigmas_are_the_experts_unless_the_config_says_otherwise(
    tmp_path: Path, text: str, low: float, high: float
) -> None:
    objective = build_objective(config_of(tmp_path, text), context())
    assert (objective.sigmas.low, objective.sigmas.high) == (low, high)
    random = torch.Generator().manual_seed(0)
    drawn = [objective.sigmas.draw(objective.sampler, random, 1560).item() for _ in range(400)]
    assert min(drawn) >= low - 1e-6
    assert max(drawn) <= high + 1e-6
    assert max(drawn) - min(drawn) > 0.7 * (high - low)


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("zero_stage = 1\n", False),
        ("zero_stage = 2\n", True),
        ('zero_stage = 1\noffload_optimizer = "cpu"\n', True),
    ],
)
def test_a_technique_that_reads_whole_gradients_needs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, refused: bool
) -> None:
    monkeypatch.setattr(ContrastiveFlow, "needs", frozenset({Need.FULL_GRADS}))
    config = config_of(
        tmp_path, f'[[techniques]]\nname = "contrastive_flow"\n[distributed]\n{text}'
    )
    if not refused:
        assert len(build_techniques(config, context(), 2)) == 1
        return
    with pytest.raises(ConfigError, match="whole gradients"):
        build_techniques(config, context(), 2)


def test_a_technique_that_compares_samples_needs_more_than_one(tmp_path: Path) -> None:
    config = config_of(tmp_path, '[[techniques]]\nname = "contrastive_flow"\n')
    with pytest.raises(ConfigError, match="every batch has one"):
        build_techniques(config, context(), largest_batch=1)
    (technique,) = build_techniques(config, context(), largest_batch=2)
    assert technique.config.weight == 0.05  # type: ignore[attr-defined]


def test_a_technique_that_works_on_tokens_needs_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = '[distributed]\nsequence_parallel = 2\n[[techniques]]\nname = "contrastive_flow"\n'
    config = config_of(tmp_path, text)
    assert len(build_techniques(config, context(), largest_batch=2)) == 1
    monkeypatch.setattr(ContrastiveFlow, "block_hooks", lambda self: ())
    with pytest.raises(ConfigError, match="each process has a part") as refused:
        build_techniques(config, context(), largest_batch=2)
    (problem,) = refused.value.problems
    assert problem.key == "techniques[0]"
    assert "distributed.sequence_parallel = 1" in problem.hint


def test_devices_that_are_not_there_are_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path, '[distributed]\ndevice = "cuda"\n')
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no CUDA device"):
            pick_device(config)
    cpu = config_of(tmp_path, '[distributed]\ndevice = "cpu"\n')
    assert pick_device(cpu) == torch.device("cpu")
    assert num_processes(cpu) == 1
    assert num_processes(config_of(tmp_path, "[distributed]\nnum_processes = 3\n")) == 3


@pytest.mark.parametrize(("installed", "processes"), [(True, 4), (False, 1)])
def test_all_gpus_are_used_by_an_engine_that_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool, processes: int
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(build, "is_installed", lambda: installed)
    assert num_processes(config_of(tmp_path, "")) == processes
    assert num_processes(config_of(tmp_path, '[distributed]\nengine = "local"\n')) == 1
