"""What is refused where a model has two experts, with key and line, and what each one trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trainer.contract.config import RunConfig, load_config
from trainer.contract.config_rules import check_files, check_rules, validation_timesteps
from trainer.contract.errors import ConfigError
from trainer.contract.experts import (
    boundary_of,
    expert_timesteps,
    for_expert,
    output_names,
    single_expert,
    trained_experts,
    trains_both,
)
from trainer.contract.variants import VARIANTS

BOTH = '[model]\nvariant = "wan2.2-t2v-a14b"\nexpert = "both"\n'
"""Three lines."""


def config(expert: str = "both", **sections: Any) -> RunConfig:
    model = {"variant": "wan2.2-t2v-a14b", "expert": expert} | sections.pop("model", {})
    return RunConfig.model_validate({"model": model} | sections)


@pytest.mark.parametrize(
    ("text", "line", "key", "words"),
    [
        (BOTH + "[distributed]\nzero_stage = 3\n", 5, "distributed.zero_stage",
         "an expert's weights wait in RAM"),
        (BOTH + '[adapter]\nkind = "none"\n[distributed]\nzero_stage = 2\n', 3, "model.expert",
         "fine-tune one expert after"),
        (BOTH + "[experts]\nsteps_per_turn = 2000\n", 5, "experts.steps_per_turn",
         "high_noise expert gets none of the 1600 steps"),
        (BOTH + "[experts]\nsteps_per_turn = 0\n", 5, "experts.steps_per_turn", "equal to 1"),
        (BOTH + "[experts]\nhigh_noise_share = 1.0\n", 5, "experts.high_noise_share",
         'should be a number above 0 and below 1, or "auto"'),
        (BOTH + '[experts]\nhigh_noise_share = "half"\n', 5, "experts.high_noise_share", "auto"),
        (BOTH + "[experts]\nsteps_per_trun = 5\n", 5, "experts.steps_per_trun",
         "did you mean 'steps_per_turn'?"),
        (BOTH + "[objective]\nmin_timestep = 900\n", 5, "objective.min_timestep",
         "low_noise: the range of trained timesteps is empty: 900 to 875"),
        (BOTH + "[objective]\nmax_timestep = 800\n", 5, "objective.max_timestep",
         "high_noise: the range of trained timesteps is empty: 875 to 800"),
        (BOTH + "[high_noise]\nmin_timestep = 1000\n", 5, "high_noise.min_timestep",
         "empty: 1000 to 1000"),
        (BOTH + '[objective]\ntimestep_sampler = "uniform"\n[low_noise]\nflow_shift = 2.0\n', 7,
         "low_noise.flow_shift", "'uniform' has no flow shift"),
        (BOTH + "expert_boundary = 1.0\n", 4, "model.expert_boundary", "less than 1"),
        ('[model]\nvariant = "wan2.1-t2v-1.3b"\nexpert_boundary = 0.9\n', 3,
         "model.expert_boundary", "only Wan 2.2 A14B has experts"),
        ('[model]\nvariant = "wan2.1-t2v-1.3b"\n[low_noise]\nlearning_rate = 1e-4\n', 3,
         "low_noise", "only Wan 2.2 A14B has experts"),
        ('[model]\nvariant = "wan2.2-t2v-a14b"\n', None, "model.expert", 'set expert = "both"'),
        ('[model]\nvariant = "wan2.2-t2v-a14b"\nexpert = "hihg_noise"\n', 3, "model.expert",
         "'both'"),
    ],
)  # fmt: skip
def test_refused_with_key_and_line(
    tmp_path: Path, text: str, line: int | None, key: str, words: str
) -> None:
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as found:
        load_config(path)
    (problem,) = found.value.problems
    assert problem.key == key
    assert words in f"{problem.message} {problem.hint}"
    if line is not None:
        assert problem.line == line


def test_both_files_are_needed(tmp_path: Path) -> None:
    (tmp_path / "low").touch()
    given = {"transformer": tmp_path / "low"}
    problems = check_files(config(model=given), "train")
    assert "model.transformer_high_noise" in {problem.key for problem in problems}
    assert "model.transformer" not in {problem.key for problem in problems}


@pytest.mark.parametrize(
    ("sections", "high", "low"),
    [
        ({}, (875, 1000), (0, 875)),
        ({"model": {"expert_boundary": 0.9}}, (900, 1000), (0, 900)),
        ({"objective": {"min_timestep": 100, "max_timestep": 950}}, (875, 950), (100, 875)),
        # Its own section wins, over the boundary, too.
        ({"low_noise": {"max_timestep": 920}}, (875, 1000), (0, 920)),
        ({"objective": {"min_timestep": 100}, "low_noise": {"min_timestep": 50},
          "high_noise": {"max_timestep": 990}}, (875, 990), (50, 875)),
    ],
)  # fmt: skip
def test_ranges_of_both(
    sections: dict[str, Any], high: tuple[float, float], low: tuple[float, float]
) -> None:
    found = config(**sections)
    assert not check_rules(found)
    boundary = boundary_of(found)
    assert expert_timesteps(found, "high_noise", boundary) == high
    assert expert_timesteps(found, "low_noise", boundary) == low


def test_a_run_of_both_is_two_runs_of_one() -> None:
    found = config(
        optimizer={"learning_rate": 1e-4},
        objective={"flow_shift": 3.0},
        high_noise={"learning_rate": 3e-5, "flow_shift": 7.0},
        validation={"timesteps": [100, 875, 900]},
    )
    high, low = (for_expert(found, expert, 0.875) for expert in ("high_noise", "low_noise"))
    assert (high.model.expert, low.model.expert) == ("high_noise", "low_noise")
    assert (high.optimizer.learning_rate, low.optimizer.learning_rate) == (3e-5, 1e-4)
    shifts = [one.objective.options("timestep_sampler")["flow_shift"] for one in (high, low)]
    assert shifts == [7.0, 3.0]
    assert (high.objective.min_timestep, low.objective.max_timestep) == (875, 875)
    assert validation_timesteps(high, 0.875) == (875, 900)
    assert validation_timesteps(low, 0.875) == (100,)
    assert validation_timesteps(found, 0.875) == (100, 875, 900)
    for one in (high, low):
        assert not check_rules(one)
        assert for_expert(one, one.model.expert, 0.875) == one, "there is nothing more to fold in"


def test_an_expert_alone_takes_its_section_and_the_objective() -> None:
    alone = config(
        "low_noise",
        objective={"max_timestep": 950},
        low_noise={"min_timestep": 10, "learning_rate": 2e-5},
        high_noise={"learning_rate": 5e-5},
    )
    folded = for_expert(alone, "low_noise", 0.875)
    assert expert_timesteps(alone, "low_noise", 0.875) == (10, 950)
    assert (folded.objective.min_timestep, folded.objective.max_timestep) == (10, 950)
    assert folded.optimizer.learning_rate == 2e-5


def test_who_is_trained_and_where_it_goes() -> None:
    both, shared, high = config(), config("shared"), config("high_noise")
    plain = RunConfig()
    experts = ("high_noise", "low_noise")
    assert [trained_experts(one) for one in (both, shared, high, plain)] == [
        experts, experts, ("high_noise",), (),
    ]  # fmt: skip
    assert [single_expert(one) for one in (both, shared, high, plain)] == [
        None, None, "high_noise", None,
    ]  # fmt: skip
    assert [trains_both(one) for one in (both, shared, high, plain)] == [True, True, False, False]
    assert output_names(both) == {"high_noise": "lora_high_noise", "low_noise": "lora_low_noise"}
    assert output_names(shared) == {"high_noise": "lora", "low_noise": "lora"}
    assert (output_names(high), output_names(plain)) == ({"high_noise": "lora"}, {None: "lora"})


def test_the_boundary_is_the_variants_unless_it_is_given() -> None:
    assert boundary_of(config()) == 0.875
    assert boundary_of(config(model={"expert_boundary": 0.7})) == 0.7
    i2v = config(model={"variant": "wan2.2-i2v-a14b"})
    assert boundary_of(i2v) == 0.9
    assert boundary_of(RunConfig()) == 0.0
    assert boundary_of(RunConfig(), VARIANTS["wan2.1-t2v-14b"]) == 0.0
