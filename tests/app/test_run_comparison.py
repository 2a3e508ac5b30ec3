"""Runs beside one another, against figures that are computed here in another way."""

from __future__ import annotations

import json
import os

import pytest

from app.domain.run_comparison import WARM_UP, config_rows, figure_rows, read_runs
from trainer.contract.events import EventWriter
from trainer.contract.run_dir import RunDir

CONFIG = """\
name = "{name}"
[model]
variant = "wan2.1-t2v-1.3b"
[optimizer]
learning_rate = {rate}
"""


def a_run(folder, name, losses, rate="1e-4", more=""):
    run = RunDir(folder / name)
    emit = EventWriter(run.events)
    for step, loss in enumerate(losses, 1):
        emit("step", step=step, loss=loss, step_time_s=float(step % 3), peak_vram_gib=step / 10)
        if step % 20 == 0:
            emit("validation", step=step, loss=loss + 0.5)
    emit("end", reason="done")
    run.config.write_text(CONFIG.format(name=name, rate=rate) + more)
    return run


def averages(losses, weight=0.98):
    """Return weighted means by their definition: the newest weighs 1, the one before 0.98, …"""
    found = []
    for end in range(1, len(losses) + 1):
        weights = [weight ** (end - 1 - place) for place in range(end)]
        total = sum(w * loss for w, loss in zip(weights, losses[:end], strict=True))
        found.append(total / sum(weights))
    return found


@pytest.fixture
def pair(tmp_path):
    falling = [1 / step for step in range(1, 101)]
    bent = [abs(step - 70) / 70 + 0.1 for step in range(1, 101)]
    folder = tmp_path / "runs"
    return [a_run(folder, "fish", falling), a_run(folder, "bird", bent, rate="3e-4")], bent


def cells(rows):
    return {row.name: [cell.split() for cell in row.cells] for row in rows}


def test_figures_are_those_of_the_steps_and_the_best_is_marked(pair):
    runs, bent = pair
    found = read_runs(runs)
    expected = averages(bent)
    assert found[1].figures["loss"] == pytest.approx(expected[-1])
    assert found[1].figures["best_loss"] == pytest.approx(min(expected[WARM_UP:]))
    assert found[1].figures["best_validation"] == pytest.approx(bent[59] + 0.5)
    assert found[1].figures["best_validation_step"] == 60
    assert found[1].figures["step_time_s"] == 1.0
    shown = cells(figure_rows(found))
    assert shown["step"] == [["100"], ["100"]]
    assert shown["validation, last"][0] == ["0.51000", "*"]
    assert shown["peak VRAM, GiB"] == [["10.00"], ["10.00"]], "of two alike, neither is better"


def test_only_options_that_differ_are_told_with_their_defaults(pair):
    runs, _ = pair
    assert config_rows(read_runs(runs)) == [
        ("name", ("fish", "bird")),
        ("optimizer.learning_rate", ("0.0001", "0.0003")),
    ]


def test_losses_of_another_task_are_not_compared(pair, tmp_path):
    runs, _ = pair
    other = a_run(
        tmp_path / "runs", "shift", [0.1] * 60, more="[objective]\nloss = 'mse'\nflow_shift = 9\n"
    )
    rows = {row.name: row for row in figure_rows(read_runs([runs[0], other]))}
    assert not rows["loss, average at the end"].comparable
    assert not any("*" in cell for cell in rows["loss, average at the end"].cells)
    assert rows["validation, best"].comparable


def test_the_command_prints_tables_or_json(menma, pair):
    runs, _ = pair
    answer = menma("runs", "compare", "fish", "bird")
    assert answer.code == 0
    assert "optimizer.learning_rate  0.0001  0.0003" in answer.out
    told = json.loads(menma("runs", "compare", str(runs[0].root), "bird", "--json").out)
    assert told["config"]["optimizer.learning_rate"] == {"fish": "0.0001", "bird": "0.0003"}
    assert told["runs"][0]["figures"]["step"] == 100
    assert told["runs"][1]["validation"][0][0] == 20


def test_mistakes_are_told(menma, pair):
    assert menma("runs", "compare", "fish").code == 2
    assert "did you mean" in menma("runs", "compare", "fish", "brid").err


@pytest.mark.parametrize("damage", ["nonsense = [", "unknown = 3\n", None])
def test_a_damaged_run_is_compared_as_far_as_it_goes(menma, pair, damage):
    runs, _ = pair
    with runs[1].events.open("ab") as file:
        file.write(b"{half\n" + os.urandom(100).replace(b"\n", b"") + b"\n")
    runs[1].config.unlink() if damage is None else runs[1].config.write_text(damage)
    answer = menma("runs", "compare", "fish", "bird")
    assert answer.code == 0
    assert "2 lines of the events cannot be read" in answer.err
    assert "validation, best" in answer.out
