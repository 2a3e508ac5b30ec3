"""`adapter.init_from` of kinds beyond LoRA in whole runs: start, resume, check, list of targets."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.e2e.project import Project
from tests.e2e.test_adapter_options import STILL, deltas, steps, train

__all__ = ["train"]  # the fixture

KINDS = {
    "loha": ("rank = 2\n", 'rank = "from_weights"\n'),
    "relora": ("rank = 2\nrestart_every_steps = 2\nrestart_warmup_steps = 1\n",) * 2,
}


def choose(project: Project, kind: str, options: str) -> None:
    """Let the config train this kind."""
    text = project.config.read_text(encoding="utf-8")
    start, end = text.index("[adapter]\n"), text.index("\n\n", text.index("[adapter]\n"))
    section = f'[adapter]\nkind = "{kind}"\n{options}'
    project.config.write_text(text[:start] + section + text[end:], encoding="utf-8")


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_starts_from_a_file_and_a_resumed_one_from_its_checkpoint(train, project, kind):
    options, again = KINDS[kind]
    choose(project, kind, options)
    first = train("first", "training.max_steps=3", "output.layout='kohya'")
    start = f"init_from = '{first}'\n"
    choose(project, kind, again + start)
    still = deltas(train("still", STILL, "training.max_steps=1"))
    for name, delta in deltas(first).items():
        torch.testing.assert_close(still[name], delta, rtol=1e-2, atol=1e-4)  # bf16 files
    long = ("training.max_steps=4", "checkpoint.every_steps=2", "output.dtype='fp32'")
    whole = load_file(train("whole", *long))
    runs = project.folder / "runs"
    shutil.copytree(runs / "whole" / "checkpoints", runs / "again" / "checkpoints")
    shutil.rmtree(runs / "again" / "checkpoints" / "step-00000004")
    with safe_open(first, "pt") as file:
        metadata = file.metadata()
    others = {
        name: value if value.dim() == 0 else value * 3 for name, value in load_file(first).items()
    }
    save_file(others, first, metadata=metadata)
    resumed = load_file(train("again", *long, resume="auto"))
    assert [event["step"] for event in steps(project.folder, "again")] == [3, 4]
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_check_names_file_and_key_and_targets_has_the_ranks_of_the_file(train, project):
    choose(project, "loha", "rank = 3\n")
    path = train("first", "training.max_steps=1")
    choose(project, "loha", f"rank = 'from_weights'\ninit_from = '{path.as_posix()}'\n")
    listed = json.loads(project.done("lora", "targets", project.config, "--json").out)
    assert {module["rank"] for module in listed["modules"]} == {3}
    assert listed["total"] == sum(value.numel() for value in load_file(path).values())
    choose(project, "lokr", f"rank = 2\ninit_from = '{path.as_posix()}'\n")
    outcome = project.menma("check", project.config)
    assert outcome.code == 2
    assert "adapter.init_from" in outcome.words
    assert "hada_w1_a is no part of a LoKr" in outcome.words
    assert "Traceback" not in outcome.words
