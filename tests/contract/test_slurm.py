"""What srun's variables become, and SLURM's way of writing lists of machines."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.contract.errors import ConfigError
from trainer.contract.slurm import adopt, expand_nodelist, is_task

TASK = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("node1", ["node1"]),
        ("node[01-03,07],x1", ["node01", "node02", "node03", "node07", "x1"]),
        ("n[9-11]", ["n9", "n10", "n11"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("a[1-2]-ib,b", ["a1-ib", "a2-ib", "b"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
    ],
)
def test_lists_are_expanded(text, names):
    assert expand_nodelist(text) == names


@pytest.mark.parametrize(
    "text",
    ["", "a,", "n[1-", "n]1", "n[[1]]", "n[]", "n[a-b]", "n[3-1]", "n[1-9999999999]", "n[1]]"],
)
def test_what_is_no_list_is_refused(text):
    with pytest.raises(ConfigError, match="list of machines"):
        expand_nodelist(text)


@st.composite
def groups(draw) -> tuple[str, list[str]]:
    """Return a list as SLURM writes it and the names in it."""
    parts, names = [], []
    for prefix in draw(
        st.lists(st.from_regex(r"[a-z]{1,3}-?", fullmatch=True), min_size=1, max_size=4)
    ):
        width = draw(st.integers(1, 4))
        ranges = draw(st.lists(st.integers(0, 50), min_size=1, max_size=3))
        pieces = []
        for first in ranges:
            last = first + draw(st.integers(0, 5))
            alone = first == last and draw(st.booleans())
            pieces.append(f"{first:0{width}}" + ("" if alone else f"-{last:0{width}}"))
            names += [f"{prefix}{number:0{width}}" for number in range(first, last + 1)]
        parts.append(f"{prefix}[{','.join(pieces)}]")
    return ",".join(parts), names


@given(groups())
def test_what_slurm_joins_is_parted(case):
    text, names = case
    assert expand_nodelist(text) == names


@given(st.text("n01-,[] ", max_size=20))
def test_any_text_gives_names_or_is_refused(text):
    try:
        names = expand_nodelist(text)
    except ConfigError:
        return
    assert names
    assert all(names)
    assert not any(letter in name for name in names for letter in "[],")


def test_a_task_of_srun_learns_its_place():
    environ = dict(TASK)
    adopt(environ)
    assert {name: environ[name] for name in set(environ) - set(TASK)} == {
        "RANK": "9",
        "WORLD_SIZE": "16",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": str(20000 + 3456),
    }


def test_all_tasks_of_a_step_meet_at_one_place_and_steps_do_not():
    def place(**changes):
        environ = TASK | changes
        adopt(environ)
        return environ["MASTER_ADDR"], environ["MASTER_PORT"]

    assert place(SLURM_PROCID="0", SLURM_LOCALID="0") == place()
    assert place(SLURM_STEP_ID="1") != place()
    assert place(SLURM_STEP_NODELIST="gpu08") == ("gpu08", "23456")
    assert place(MASTER_ADDR="ib7", MASTER_PORT="5") == ("ib7", "5")


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {name: TASK[name] for name in TASK if name != "SLURM_STEP_ID"},  # the batch script
        TASK | {"SLURM_NTASKS": "1"},
        TASK | {"SLURM_STEP_NUM_TASKS": "1"},  # the shell of an interactive job
        TASK | {"RANK": "0", "WORLD_SIZE": "2"},  # torchrun under srun
    ],
)
def test_others_stay_as_they_are(environ):
    before = dict(environ)
    assert not is_task(environ)
    adopt(environ)
    assert environ == before


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"SLURM_LOCALID": ""}, "SLURM_LOCALID"),
        ({"SLURM_JOB_NODELIST": ""}, "does not say which machines"),
        ({"SLURM_JOB_NODELIST": "n[1"}, "list of machines"),
    ],
)
def test_what_cannot_be_understood_is_said(changes, word):
    with pytest.raises(ConfigError, match=word):
        adopt(TASK | changes)
