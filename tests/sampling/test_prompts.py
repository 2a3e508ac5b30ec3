"""Prompt files: what they say is understood, and what is wrong is named with file and line."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.contract.config import Prompt
from trainer.contract.errors import ConfigError
from trainer.contract.prompt_keys import (
    FLAGS,
    FOREIGN,
    INFERENCE_FLAGS,
    SPELLINGS,
    key_of,
    key_of_flag,
    parse_value,
)
from trainer.contract.prompts import parse_prompt_line, read_prompts
from trainer.contract.vary import read_matrix


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_text_file_with_all_flags(tmp_path: Path) -> None:
    path = write(
        tmp_path / "p.txt",
        "\ufeff# comment\n\n"
        "a well-known cat -- running --w 832 --h 480 --f 81 --d 7 --s 20 --l 4.5 --fs 3 "
        "--n bad, blurry --i in put.png --ei end.png\n"
        "  plain prompt  \n",
    )
    first, second = read_prompts(path)
    assert first == Prompt(
        prompt="a well-known cat -- running",
        width=832,
        height=480,
        num_frames=81,
        seed=7,
        num_steps=20,
        guidance_scale=4.5,
        flow_shift=3.0,
        negative_prompt="bad, blurry",
        image=Path("in put.png"),
        last_image=Path("end.png"),
    )
    assert second == Prompt(prompt="plain prompt")


def test_an_empty_negative_prompt_is_kept() -> None:
    assert parse_prompt_line("a cat --n").negative_prompt == ""


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("a cat --x 3", ["unknown flag", "--x"]),
        ("a cat --heigth 3", ["unknown flag", "--heigth"]),
        ("a cat --l 4 --g 3", ["--g", "twice", "--l is the same"]),
        ("a cat --num-step 3", ["unknown flag", "'--num-steps'"]),
        ("a cat --cfg-scal 3", ["unknown flag", "'--cfg-scale'"]),
        ("a cat --prompt a dog", ["--prompt", "write the text first"]),
        ("a cat --cim mask.png", ["--cim", "masks"]),
        ("a cat --guidance-high-noise much", ["--guidance-high-noise", "much"]),
        ("a cat --solver", ["--solver", "no value"]),
        ("a cat --w wide", ["--w", "wide"]),
        ("a cat --w 832 --w 480", ["--w", "twice"]),
        ("a cat --w --h 480", ["--w", "no value"]),
        ("a cat --s 0", ["--s"]),
        ("--w 832", ["no text"]),
    ],
)
def test_mistakes_name_file_and_line(tmp_path: Path, line: str, words: list[str]) -> None:
    path = write(tmp_path / "p.txt", f"# one\ngood\n{line}\n")
    with pytest.raises(ConfigError) as caught:
        read_prompts(path)
    for word in [f"{path}:3", *words]:
        assert word in str(caught.value)


def test_g_and_l_are_both_guidance() -> None:
    """musubi-tuner's inference takes either for classifier-free guidance of Wan."""
    assert parse_prompt_line("a cat --g 3") == parse_prompt_line("a cat --l 3")
    assert parse_prompt_line("a cat --g 3").guidance_scale == 3


def test_every_key_of_a_prompt_has_a_long_flag() -> None:
    written = {
        "negative_prompt": "bad, blurry", "width": "64", "height": "48", "num_frames": "9",
        "num_steps": "3", "guidance_scale": "2.5", "guidance_scale_high_noise": "1.5",
        "flow_shift": "2", "solver": "euler", "seed": "4", "image": "a b.png", "last_image": "c",
        "control": "d.mp4", "fps": "12", "name": "cat",
    }  # fmt: skip
    expected = Prompt.model_validate({"prompt": "a cat", **written})
    unset = {key for key, value in expected.model_dump().items() if value is None}
    assert unset == set(Prompt.model_fields) - {"prompt", *written}
    for separator in "-_":
        flags = [f"--{key.replace('_', separator)} {value}" for key, value in written.items()]
        assert parse_prompt_line(" ".join(["a cat", *flags])) == expected


@pytest.mark.parametrize("key", [key for key in Prompt.model_fields if key != "prompt"])
def test_no_key_is_left_without_a_flag(key: str) -> None:
    assert key_of_flag(key.replace("_", "-")) == key


@pytest.mark.parametrize(("other", "key"), SPELLINGS.items())
def test_other_names_mean_a_key_that_exists(other: str, key: str) -> None:
    assert key in Prompt.model_fields
    assert other not in Prompt.model_fields
    assert key_of(other) == key
    assert other not in {**FLAGS, **INFERENCE_FLAGS, **FOREIGN}


@pytest.mark.parametrize(
    ("annotation", "text", "value"),
    [
        (tuple[int, ...] | None, "1, 2,3", ["1", "2", "3"]),
        (tuple[float, ...], "", []),
        (bool | None, "", True),
        (bool | None, "false", "false"),
        (int | None, "7", "7"),
        (str, "a, b", "a, b"),
    ],
)
def test_values_by_the_type_of_their_key(annotation: Any, text: str, value: object) -> None:
    assert parse_value(annotation, text) == value


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "p.txt", "a --x 1 --w wide\nb --y 2\n")
    with pytest.raises(ConfigError) as caught:
        read_prompts(path)
    assert [(p.line, p.key) for p in caught.value.problems] == [(1, "--x"), (2, "--y")]


def test_toml(tmp_path: Path) -> None:
    path = write(
        tmp_path / "p.toml",
        '[[prompts]]\nprompt = "a"\nwidth = 64\n[[prompts]]\nprompt = "b"\nguidance_scale = 3\n',
    )
    assert read_prompts(path) == (
        Prompt(prompt="a", width=64),
        Prompt(prompt="b", guidance_scale=3.0),
    )


def test_takenokos_toml(tmp_path: Path) -> None:
    path = write(
        tmp_path / "p.toml",
        '[[sample_prompts]]\ntext = "a"\nwidth = 64\nheight = 48\nframes = 9\nseed = 3\n'
        'step = 4\ncfg_scale = 2.5\n[[sample_prompts]]\ntext = "b"\nframes = 0\n',
    )
    with pytest.raises(ConfigError, match=rf"{re.escape(str(path))}:11: .*\[1\]\.frames: "):
        read_prompts(path)
    write(path, path.read_text().replace("frames = 0", "frames = 5"))
    assert read_prompts(path) == (
        Prompt(
            prompt="a", width=64, height=48, num_frames=9, seed=3, num_steps=4, guidance_scale=2.5
        ),
        Prompt(prompt="b", num_frames=5),
    )


def test_musubis_toml_has_common_values(tmp_path: Path) -> None:
    path = write(
        tmp_path / "p.toml",
        "[prompt]\nwidth = 64\ncfg_scale = 2\n"
        '[[prompt.subset]]\nprompt = "a"\n[[prompt.subset]]\nprompt = "b"\nwidth = 32\n',
    )
    assert read_prompts(path) == (
        Prompt(prompt="a", width=64, guidance_scale=2.0),
        Prompt(prompt="b", width=32, guidance_scale=2.0),
    )


def test_two_names_for_one_key_are_a_mistake(tmp_path: Path) -> None:
    path = write(tmp_path / "p.toml", '[[prompts]]\nprompt = "a"\nframes = 5\nnum_frames = 9\n')
    with pytest.raises(ConfigError, match=r"p\.toml:4: .*given twice \(frames is the same\)"):
        read_prompts(path)


def test_toml_mistakes_name_the_line_and_the_nearest_key(tmp_path: Path) -> None:
    path = write(tmp_path / "p.toml", '[[prompts]]\nprompt = "a"\n\nwidht = 64\n')
    with pytest.raises(ConfigError) as caught:
        read_prompts(path)
    message = str(caught.value)
    assert f"{path}:4" in message
    assert "'width'" in message
    path = write(tmp_path / "q.toml", '[[promts]]\nprompt = "a"\n')
    with pytest.raises(ConfigError, match="'prompts'"):
        read_prompts(path)
    path = write(tmp_path / "r.toml", "[[prompts]\n")
    with pytest.raises(ConfigError, match="TOML"):
        read_prompts(path)


def test_json(tmp_path: Path) -> None:
    items = ["a", {"prompt": "b", "seed": 3}]
    path = write(tmp_path / "p.json", json.dumps(items))
    assert read_prompts(path) == (Prompt(prompt="a"), Prompt(prompt="b", seed=3))


def test_a_library_of_prompts_has_nicknames(tmp_path: Path) -> None:
    library = {"tom": "a cat", "rex": {"prompt": "a dog", "seed": 3}}
    path = write(tmp_path / "p.json", json.dumps(library))
    assert read_prompts(path) == (
        Prompt(prompt="a cat", name="tom"),
        Prompt(prompt="a dog", seed=3, name="rex"),
    )


@pytest.mark.parametrize(
    "text",
    [
        '{"prompts": []}',
        '{"a": 3}',
        '{"a": {"seed": 3}}',
        "[3]",
        '[{"prompt": "a", "wid": 1}]',
        "[",
        "[]",
    ],
)
def test_json_mistakes(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"p\.json"):
        read_prompts(write(tmp_path / "p.json", text))


def test_missing_empty_binary_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not found"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(ConfigError, match="no prompt"):
        read_prompts(write(tmp_path / "empty.txt", "# nothing\n"))
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        read_prompts(tmp_path / "binary.txt")
    with pytest.raises(ConfigError, match="known endings"):
        read_prompts(write(tmp_path / "p.csv", "a"))


_words = st.text(st.characters(categories=["L", "N"], include_characters=",.!-"), min_size=1)
_texts = (
    st.lists(_words.filter(lambda word: not word.startswith("--")), min_size=1, max_size=5)
    .map(" ".join)
    .filter(lambda text: not text.startswith("#"))
)
_values = {
    "width": st.integers(16, 4096),
    "height": st.integers(16, 4096),
    "num_frames": st.integers(1, 500),
    "seed": st.integers(0, 2**63 - 1),
    "num_steps": st.integers(1, 1000),
    "guidance_scale": st.floats(0, 100),
    "flow_shift": st.floats(0.001, 100),
    "negative_prompt": _texts,
}


@settings(deadline=None)  # a loaded machine is no failure
@given(_texts, st.fixed_dictionaries({}, optional=_values))
def test_a_written_line_is_read_back(text: str, fields: dict[str, object]) -> None:
    names = {key: flag for flag, key in FLAGS.items()}
    line = " ".join([text, *(f"--{names[key]} {value}" for key, value in fields.items())])
    assert parse_prompt_line(line) == Prompt(prompt=text, **fields)


@settings(deadline=None)
@given(st.text())
def test_any_line_is_a_prompt_or_a_clear_error(line: str) -> None:
    with suppress(ConfigError):  # anything else fails
        parse_prompt_line(line)


def test_a_line_ends_where_the_file_says(tmp_path: Path) -> None:
    """Prompts from web pages have separators in them that Python takes for ends of lines."""
    path = tmp_path / "p.txt"
    path.write_bytes("one\u2028still one\x0band\x85on --d 1\r\ntwo --d 2\rthree --w x\n".encode())
    with pytest.raises(ConfigError) as raised:
        read_prompts(path)
    assert [problem.line for problem in raised.value.problems] == [3]
    path.write_bytes("one\u2028still one --d 1\r\ntwo --d 2\n".encode())
    assert [(p.prompt, p.seed) for p in read_prompts(path)] == [
        ("one\u2028still one", 1), ("two", 2)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.json", f"[{'1' * 5000}]"),
        ("p.toml", f"a = {'1' * 5000}"),
        ("p.toml", f"a = {'[' * 5000}"),
    ],
)
def test_files_without_end_are_mistakes(tmp_path: Path, name: str, text: str) -> None:
    path = write(tmp_path / name, text)
    with pytest.raises(ConfigError, match="not valid"):
        read_prompts(path)
    if path.suffix == ".toml":
        with pytest.raises(ConfigError, match="not valid TOML"):
            read_matrix(path)


def test_halves_of_characters_are_no_text(tmp_path: Path) -> None:
    path = write(
        tmp_path / "p.json", '["fine \\ud83d\\ude00", "a \\ud83d cat", {"prompt": "a", "n": 1}]'
    )
    with pytest.raises(ConfigError) as raised:
        read_prompts(path)
    told = [problem for problem in raised.value.problems if "no UTF-8 text" in problem.message]
    assert [problem.key for problem in told] == ["[1].prompt"]
