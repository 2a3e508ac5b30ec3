"""What a sheet varies: options and matrix files are understood, mistakes are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.contract.config import Prompt, SamplingSection
from trainer.contract.errors import ConfigError
from trainer.contract.lora_use import SampleLoRA
from trainer.contract.variants import get_variant
from trainer.contract.vary import Axis, lora_of, pairs, parse_vary, read_matrix
from trainer.sampling.matrix import build_sheet

VARIANT = get_variant("wan2.1-t2v-1.3b")


@pytest.mark.parametrize(
    ("text", "key", "values"),
    [
        ("seed=1,2, 3", "seed", (1, 2, 3)),
        ("seed=1..3,9", "seed", (1, 2, 3, 9)),
        ("cfg=3,5.5", "guidance_scale", (3.0, 5.5)),
        ("num-steps=4", "num_steps", (4,)),
        ("solver=euler,unipc", "solver", ("euler", "unipc")),
        ('prompt="a cat, red",1..3', "prompt", ("a cat, red", "1..3")),
        ("lora=0,0.5,-1", "lora", (0.0, 0.5, -1.0)),
        ("negative=a=b,c", "negative_prompt", ("a=b", "c")),
    ],
)
def test_options(text: str, key: str, values: tuple[object, ...]) -> None:
    assert parse_vary(text) == Axis(key=key, values=values)


def test_files_of_axes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a=b.safetensors", "x-step2.safetensors", "x.safetensors"):
        Path(name).touch()
    assert parse_vary("lora:a=b.safetensors=0,1").key == "lora:a=b.safetensors"
    axis = parse_vary("lora:x.safetensors@high_noise=0,1")
    assert lora_of(axis.key) == (Path("x.safetensors"), "high_noise")
    checkpoints = parse_vary(f"checkpoint=none,{tmp_path}/x*.safetensors")
    assert [Path(str(value)).name for value in checkpoints.values] == [
        "none", "x-step2.safetensors", "x.safetensors",
    ]  # fmt: skip


def test_files_of_both_experts_are_one_checkpoint() -> None:
    names = ["c_high_noise-step1", "c_high_noise", "b", "c_low_noise-step1", "c_low_noise"]
    found = [[path.name for path in pair] for pair in pairs([Path(name) for name in names])]
    assert found == [
        ["c_high_noise-step1", "c_low_noise-step1"],
        ["c_high_noise", "c_low_noise"],
        ["b"],
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sede=1", "unknown key 'sede'.*\n.*'seed'"),
        ("seed", "no values"),
        ("seed=", "no values"),
        ("seed=a", "valid integer"),
        ("seed=1,1", "1 is there twice"),
        ("seed=9..3", "from 9 up to 3"),
        ("seed=0..99999999", "too many"),
        ("steps=0", "greater than or equal to 1"),
        ("lora=much", "'much' is no strength"),
        ("lora:none.safetensors=1", "no such LoRA file: none.safetensors"),
        ("checkpoint=none-such/*.safetensors", "no file none-such"),
        ("checkpoint=a**b/*.safetensors", r"checkpoint: (no file )?a\*\*b"),  # by version of Python
        ('prompt="a', "unexpected end of data"),
    ],
)
def test_mistakes_of_options(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_vary(text)


def test_a_matrix_file(tmp_path: Path) -> None:
    (tmp_path / "cat.safetensors").touch()
    path = tmp_path / "m.toml"
    path.write_text(
        'columns = "seed"\n[[prompts]]\ntext = "a cat"\n[vary]\nseed = [1, 2]\ncfg = [3, 5]\n'
        f'"lora:{tmp_path.as_posix()}/cat.safetensors" = [0, 1]\n',
        encoding="utf-8",
    )
    matrix = read_matrix(path)
    assert [axis.key for axis in matrix.axes[:2]] == ["seed", "guidance_scale"]
    assert matrix.axes[2].values == (0.0, 1.0)
    assert (matrix.prompts, matrix.columns) == ((Prompt(prompt="a cat"),), "seed")


def test_mistakes_of_a_matrix_file(tmp_path: Path) -> None:
    path = tmp_path / "m.toml"
    path.write_text(
        'colums = "seed"\nprompts_file = 3\n[vary]\nsede = [1]\nseed = 4\nsteps = [0]\n'
        '[[prompts]]\nprompt = "a"\nwidht = 3\n',
        encoding="utf-8",
    )
    with pytest.raises(ConfigError) as caught:
        read_matrix(path)
    placed = {problem.line: str(problem) for problem in caught.value.problems}
    assert set(placed) == {1, 2, 4, 5, 6, 9}
    assert "'columns'" in placed[1]
    assert "'seed'" in placed[4]
    assert "list of values" in placed[5]
    assert "'width'" in placed[9]


def test_a_sheet_has_rows_columns_and_headings() -> None:
    section = SamplingSection(width=32, height=32, num_frames=5, num_steps=2)
    loras = [SampleLoRA(path=Path("a"), strength=0.5), SampleLoRA(path=Path("b"))]
    sheet = build_sheet(
        [Prompt(prompt="a cat"), Prompt(prompt="a dog", name="rex")],
        [parse_vary("lora=0,2"), parse_vary("seed=1..3"), parse_vary("cfg=4")],
        loras, VARIANT, section, is_transformer=lambda _path: False,
    )  # fmt: skip
    assert len(sheet.cells) == 12
    assert [axis.labels for axis in sheet.axes] == [
        ("a cat", "rex"), ("0", "2"), ("1", "2", "3"), ("4",),
    ]  # fmt: skip
    assert sheet.columns == 2
    rows = list(sheet.rows())
    assert [place for place, _ in rows] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [cell.request.seed for cell in rows[0][1]] == [1, 2, 3]
    assert {cell.request.lora_strengths for cell in rows[3][1]} == {(1.0, 2.0)}
    assert {cell.request.guidance_scale for cell in sheet.cells} == {(4.0, 4.0)}


def test_strengths_of_one_file_leave_the_others_alone() -> None:
    loras = [SampleLoRA(path=Path("a"), strength=0.5), SampleLoRA(path=Path("b"))]
    axes = [Axis(key="lora:b", values=(0.0, 3.0)), Axis(key="lora:c", values=(1.0,))]
    sheet = build_sheet(
        [Prompt(prompt="a", width=32, height=32, num_frames=5)], axes, loras, VARIANT,
        SamplingSection(), is_transformer=lambda _path: False,
    )  # fmt: skip
    assert [use.path.name for use in sheet.loras] == ["a", "b", "c"]
    assert [cell.request.lora_strengths for cell in sheet.cells] == [(0.5, 0, 1), (0.5, 3, 1)]
