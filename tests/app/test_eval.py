"""`menma eval`: what it asks for, and how it shows what it is told."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from app.domain.comparison import better, compare, labels

MEASURED: dict[str, Any] = {
    "type": "end",
    "reason": "done",
    "name": "fish",
    "config": "fish.toml",
    "run": "runs/fish",
    "variant": "wan2.1-t2v-1.3b",
    "expert": None,
    "output": "runs/fish/output/fish.safetensors",
    "step": 500,
    "adapter": {"kind": "lora", "parameters": 1234567, "bytes": 5 * 2**20},
    "training": {"seconds": 7890.0, "peak_vram_gib": 20.5, "peak_rss_gib": 31.0},
    "validation": {
        "items": 12,
        "fingerprint": "abc",
        "base": {"loss": 0.2, "by_timestep": {"100": 0.1, "900": 0.3}},
        "trained": {"loss": 0.15, "by_timestep": {"100": 0.12, "900": 0.18}},
    },
    "probe": {
        "kind": "scenes",
        "shots": 8,
        "fingerprint": "def",
        "figures": {"colour": 0.75, "position_error": 0.1},
        "videos": None,
    },
    "evaluation": {"seconds": 12.34, "peak_vram_gib": 11.0, "peak_rss_gib": 4.0},
    "notes": [],
}


def other(**changes: Any) -> dict[str, Any]:
    """Return the figures of a second subject; `section__key=value` changes."""
    result = copy.deepcopy(MEASURED)
    for key, value in changes.items():
        *sections, last = key.split("__")
        table = result
        for section in sections:
            table = table[section]
        table[last] = value
    return result


def cells(*results: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    return {row.name: tuple(cell.strip() for cell in row.cells) for row in compare(results)}


def test_the_best_of_a_row_is_marked():
    better_one = other(
        step=900,
        validation__trained={"loss": 0.14, "by_timestep": {"100": 0.13, "900": 0.15}},
        probe__figures={"colour": 0.5, "position_error": 0.05},
        training__seconds=4000.0,
    )
    found = cells(MEASURED, better_one)
    assert found["step"] == ("500", "900")
    assert found["validation loss, base"] == ("0.20000", "0.20000")
    assert found["validation loss, trained"] == ("0.15000", "0.14000 *")
    assert found["  at timestep 100, trained"] == ("0.12000 *", "0.13000")
    assert found["colour"] == ("0.7500 *", "0.5000")
    assert found["position_error"] == ("0.1000", "0.0500 *")
    assert found["training time"] == ("2h11m", "1h06m *")
    assert found["evaluation time"] == ("12.3s", "12.3s")
    assert found["trained parameters"] == ("1,234,567", "1,234,567")
    assert all(row.comparable for row in compare([MEASURED, better_one]))


def test_values_that_look_alike_are_not_ranked():
    found = cells(MEASURED, other(evaluation__seconds=12.341, training__seconds=7891.0))
    assert found["evaluation time"] == ("12.3s", "12.3s")
    assert found["training time"] == ("2h11m", "2h11m")


def test_a_single_subject_is_the_best_of_nothing():
    assert not any("*" in cell for row in compare([MEASURED]) for cell in row.cells)


@pytest.mark.parametrize(
    ("changes", "unlike"),
    [
        (
            {"validation__fingerprint": "xyz"},
            {"validation loss, trained", "  at timestep 100, base"},
        ),
        ({"probe__fingerprint": "xyz"}, {"colour", "position_error"}),
        ({"probe__kind": "other"}, {"colour", "position_error"}),
    ],
)
def test_what_was_measured_otherwise_is_not_compared(changes, unlike):
    second = other(**changes)
    second["validation"]["trained"]["loss"] = 0.1
    second["probe"]["figures"]["colour"] = 0.1
    rows = {row.name: row for row in compare([MEASURED, second])}
    assert unlike <= {name for name, row in rows.items() if not row.comparable}
    for name in unlike:
        assert not any("*" in cell for cell in rows[name].cells)
    assert rows["training time"].comparable


def test_missing_figures_are_empty_cells_and_rows_without_any_are_left_out():
    base_alone = other(step=None, output=None, adapter=None, training=None, probe=None)
    base_alone["validation"]["trained"] = None
    found = cells(MEASURED, base_alone)
    assert found["step"] == ("500", "")
    assert found["validation loss, trained"] == ("0.15000", "")
    assert found["colour"] == ("0.7500", "")
    assert "colour" not in cells(base_alone)
    nothing = other(validation=None, evaluation__peak_vram_gib=None)
    assert not [name for name in cells(nothing) if "loss" in name or name == "evaluation peak VRAM"]


def test_names_of_columns():
    assert labels(["runs/a", "b.toml", "/x/runs/a/", "runs/my run"]) == [
        "a#1",
        "b",
        "a#2",
        "my_run",
    ]


def test_a_figure_is_better_larger_unless_its_name_says_so():
    assert [better(name) for name in ("both", "position_error", "fvd_distance", "loss_rate")] == [
        "larger", "smaller", "smaller", "larger"
    ]  # fmt: skip


@pytest.fixture
def told(monkeypatch):
    monkeypatch.setenv("FAKE_EVENTS", json.dumps([MEASURED]))


def asked(folder) -> dict[str, Any]:
    return json.loads((folder / "request.json").read_text())


def test_a_config_is_asked_for_and_shown(menma, config, tmp_path, told):
    answer = menma("eval", config, "--set", "validation.seed=3", "--save", "videos")
    assert answer.code == 0, answer.err
    recorded = asked(tmp_path)
    assert recorded["job"] == "eval"
    assert recorded["request"] == {
        "config": str(config),
        "set": ["validation.seed=3"],
        "run_dir": None,
        "save": "videos/fish",
    }
    lines = answer.out.splitlines()
    assert lines[0].split() == ["FIGURE", "fish"]
    assert "validation loss, trained      0.15000" in lines
    assert max(map(len, lines)) <= 80
    assert "fish: runs/fish/output/fish.safetensors" in answer.err
    assert "*" not in answer.out


def test_a_run_is_found_by_its_name(menma, config, tmp_path, told):
    run = tmp_path / "runs" / "fish"
    run.mkdir(parents=True)
    (run / "status.json").write_text("{}")
    (run / "config.toml").write_text(config.read_text())
    assert menma("eval", "fish").code == 0
    request = asked(tmp_path)["request"]
    assert request["config"] == "runs/fish/config.toml"
    assert request["run_dir"] == "runs/fish"


def test_json_has_all_keys_for_what_worked_and_what_did_not(menma, config, told):
    answer = menma("eval", config, "nothing", "--json")
    assert answer.code == 1
    good, bad = json.loads(answer.out)
    assert list(good) == list(bad)
    assert good["subject"] == str(config)
    assert good["error"] is None
    assert {key: good[key] for key in ("step", "validation", "probe", "training")} == {
        key: MEASURED[key] for key in ("step", "validation", "probe", "training")
    }
    assert bad["subject"] == "nothing"
    assert bad["error"] == {
        "message": "no such run: nothing",
        "hint": "there are no runs in runs",
        "exit_code": 2,
    }
    assert {value for key, value in bad.items() if key not in {"subject", "error"}} == {None}


def test_one_that_fails_does_not_hide_the_others(menma, config, tmp_path, told):
    answer = menma("eval", "nothing", config)
    assert answer.code == 1
    assert "no such run: nothing" in answer.err
    assert answer.out.splitlines()[0].split() == ["FIGURE", "fish"]


@pytest.mark.parametrize(
    ("subject", "words"),
    [
        ("nothing", "no such run"),
        ("nothing.toml", "config file not found"),
        ("broken.toml", "not valid TOML"),
        ("weightless.toml", "no such file or folder"),
    ],
)
def test_mistakes_end_with_2_and_nothing_is_started(menma, config, tmp_path, subject, words):
    (tmp_path / "broken.toml").write_text("[")
    weightless = config.read_text().replace('"transformer.safetensors"', '"gone.safetensors"')
    (tmp_path / "weightless.toml").write_text(weightless)
    answer = menma("eval", subject)
    assert answer.code == 2
    assert words in answer.err
    assert answer.out == ""
    assert not (tmp_path / "request.json").exists()
    assert menma("eval", subject, "nothing").code == 2


def test_a_job_that_fails_gives_its_exit_code_and_words(menma, config, monkeypatch):
    error = {"type": "error", "message": "clips are not cached yet", "hint": "run it", "code": 2}
    monkeypatch.setenv("FAKE_EVENTS", json.dumps([error]))
    monkeypatch.setenv("FAKE_CODE", "2")
    answer = menma("eval", config, "--json")
    assert answer.code == 2
    assert json.loads(answer.out)[0]["error"] == {
        "message": "clips are not cached yet",
        "hint": "run it",
        "exit_code": 2,
    }


def test_notes_are_told(menma, config, monkeypatch):
    monkeypatch.setenv("FAKE_EVENTS", json.dumps([other(notes=["the base alone"])]))
    answer = menma("eval", config, config)
    assert "fish#1: the base alone" in answer.err
    assert "best of its row" not in answer.err
    assert "not comparable" not in answer.err


def test_marks_are_explained_once(capsys):
    from app.cli.commands.eval import _show

    unlike = other(validation__fingerprint="x", training__seconds=1.0)
    _show(["a", "b"], [{**result, "error": None} for result in (MEASURED, unlike)])
    out, err = capsys.readouterr()
    (row,) = (line for line in out.splitlines() if line.startswith("validation loss, trained"))
    assert row.split() == ["validation", "loss,", "trained", "!", "0.15000", "0.15000"]
    assert err.splitlines()[2:] == [
        "* best of its row",
        "! not comparable: measured on different items, timesteps or noise, or with different "
        "prompts, seeds or settings of the samples",
    ]
