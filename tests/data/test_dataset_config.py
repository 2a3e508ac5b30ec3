from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.contract.dataset_config import (
    DatasetConfig,
    SourceOptions,
    load_dataset_file,
    parse_dataset,
)
from trainer.contract.dataset_problems import UNSUPPORTED_KEYS
from trainer.contract.errors import ConfigError


def problems_of(values, **more):
    with pytest.raises(ConfigError) as caught:
        parse_dataset(values, **more)
    return {problem.key: problem for problem in caught.value.problems}


def test_values_come_from_source_then_general_then_default():
    config = parse_dataset(
        {
            "general": {"resolution": 512, "batch_size": 2, "caption_extension": "caption"},
            "datasets": [
                {"video_directory": "a", "batch_size": 3, "target_frames": [5, 17]},
                {"image_directory": "b", "resolution": [640, 480]},
            ],
        }
    )
    video, image = config.sources
    assert (video.batch_size, image.batch_size) == (3, 2)
    assert (video.resolution, image.resolution) == ((512, 512), (640, 480))
    assert (video.num_repeats, video.caption_extension) == (1, ".caption")
    assert (video.kind, image.kind) == ("video", "image")


def test_musubi_file_reads_as_it_is(tmp_path):
    (tmp_path / "clips").mkdir()
    file = tmp_path / "dataset.toml"
    file.write_text(
        textwrap.dedent(
            """
            [general]
            resolution = [960, 544]
            caption_extension = ".txt"
            batch_size = 1
            enable_bucket = true
            bucket_no_upscale = false
            [[datasets]]
            video_directory = "clips"
            cache_directory = "cache"
            target_frames = [1, 25, 45]
            frame_extraction = "head"
            source_fps = 30.0
            num_repeats = 10
            """
        )
    )
    source = load_dataset_file(file).sources[0]
    assert source.video_directory == tmp_path / "clips"
    assert source.cache_path == tmp_path / "cache"
    assert source.target_frames == (1, 25, 45)
    assert source.enable_bucket
    assert source.source_fps == 30.0


def test_relative_path_falls_back_to_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "clips").mkdir()
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "configs" / "dataset.toml"
    file.write_text('[[datasets]]\nvideo_directory = "clips"\ncache_directory = "cache"\n')
    source = load_dataset_file(file).sources[0]
    assert source.video_directory == tmp_path / "clips"
    assert source.cache_directory == tmp_path / "cache"


def test_all_problems_at_once_with_their_keys(tmp_path):
    file = tmp_path / "dataset.toml"
    file.write_text(
        textwrap.dedent(
            """
            colour = 1
            [general]
            strict = "maybe"
            frame_stride = 2
            [[datasets]]
            video_directory = "x"
            frame_extraction = "heads"
            control_resolution = "z"
            source_fps = 0
            resoluton = 1
            [[datasets]]
            image_directory = "x"
            video_directory = "y"
            [[datasets]]
            image_jsonl_file = "x.jsonl"
            """
        )
    )
    with pytest.raises(ConfigError) as caught:
        load_dataset_file(file)
    problems = {problem.key: problem for problem in caught.value.problems}
    assert set(problems) == {
        "colour",
        "general.strict",
        "general.frame_stride",
        "datasets[0].frame_extraction",
        "datasets[0].control_resolution",
        "datasets[0].source_fps",
        "datasets[0].resoluton",
        "datasets[1]",
        "datasets[2]",
    }
    assert all(problem.file == file for problem in problems.values())
    lines = {key: problem.line for key, problem in problems.items()}
    assert (lines["colour"], lines["general.strict"], lines["datasets[0].source_fps"]) == (2, 4, 10)
    assert (lines["datasets[1]"], lines["datasets[2]"]) == (12, 15)
    assert "did you mean 'resolution'" in problems["datasets[0].resoluton"].hint
    assert "belongs to a source" in problems["general.frame_stride"].message
    assert "found image_directory and video_directory" in problems["datasets[1]"].message
    assert "cache_directory" in problems["datasets[2]"].message


@pytest.mark.parametrize("key", UNSUPPORTED_KEYS)
def test_unsupported_musubi_keys_are_called_so(key):
    problem = problems_of({"datasets": [{"image_directory": "x", key: 1}]})[f"datasets[0].{key}"]
    assert "musubi-tuner" in problem.message
    assert "unknown" not in problem.message
    assert key not in SourceOptions.model_fields


def test_errors_of_general_are_not_repeated_for_each_source():
    values = {"general": {"batch_size": 0}, "datasets": [{"video_directory": c} for c in "abc"]}
    assert set(problems_of(values)) == {"general.batch_size"}


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ({"video_directory": "x", "frame_extraction": "chunk", "target_frames": [1, 17]}, "chunk"),
        ({"image_directory": "x", "target_frames": [17]}, "target_frames"),
        ({}, "found none"),
        ({"video_directory": "x", "caption_extension": ""}, "2"),
        ({"video_directory": "x", "resolution": [960, 544, 3]}, "resolution"),
    ],
)
def test_what_makes_no_sense_is_refused(source, word):
    (problem,) = problems_of({"datasets": [source]}).values()
    assert word in str(problem)


def test_inline_tables_are_named_as_the_user_wrote_them():
    values = {"sources": [{"video_directory": "x", "batch_size": 0}]}
    assert set(problems_of(values, prefix="dataset.")) == {"dataset.sources[0].batch_size"}


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[[datasets]\n", b"[general]\n"])
def test_unreadable_files_are_config_errors(tmp_path, content):
    file = tmp_path / "dataset.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_dataset_file(file)
    assert str(file) in str(caught.value)
    with pytest.raises(ConfigError, match="No such"):
        load_dataset_file(tmp_path / "none.toml")


def test_dump_validates_to_the_same():
    config = parse_dataset(
        {
            "general": {"batch_size": 4},
            "datasets": [{"image_directory": "a"}, {"video_directory": "b"}],
        }
    )
    assert DatasetConfig.model_validate(config.model_dump()) == config
    assert DatasetConfig.model_validate(json.loads(config.model_dump_json())) == config


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
keys = st.sampled_from([*SourceOptions.model_fields, *UNSUPPORTED_KEYS]) | st.text(max_size=6)


@given(
    general=st.dictionaries(keys, json_values, max_size=4) | json_values,
    sources=st.lists(st.dictionaries(keys, json_values, max_size=5), max_size=3) | json_values,
)
def test_any_toml_is_a_config_or_a_config_error(general, sources):
    problems = ()
    try:
        config = parse_dataset({"general": general, "datasets": sources})
    except ConfigError as error:
        problems = error.problems
    assert problems or config.sources
    assert all(problem.message for problem in problems)


def test_the_schema_needs_no_torch():
    code = (
        "import sys, trainer.contract.dataset_config;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'av')))"
    )
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
