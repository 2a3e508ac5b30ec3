"""`menma config set` and `unset`, `menma edit` without a terminal, and the parts behind them."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import CONFIG

from app.domain.config_check import check_text
from app.domain.config_document import ConfigDocument
from app.domain.config_file import open_config
from app.domain.config_options import BASIC, options_of
from app.domain.presets import all_presets
from app.domain.template import render_config
from app.domain.toml_spans import scan
from app.render.toml_parts import toml_parts
from trainer.contract.config_io import load_config_with_sources
from trainer.contract.errors import ConfigError

TEXT = "\ufeff# mine\r\n" + CONFIG.replace("\n", "\r\n").replace(" = 5", " = 5  # few")


def test_values_are_set_and_taken_out_byte_for_byte(menma, tmp_path):
    file = tmp_path / "fish.toml"
    file.write_bytes(TEXT.encode())
    file.chmod(0o600)
    link = tmp_path / "link.toml"
    link.symlink_to(file)
    answer = menma("config", "set", link, "training.max_steps=7", "model.vae=a b.safetensors")
    assert answer.code == 0
    assert "+max_steps = 7  # few" in answer.out
    assert "line 7: model.vae: no such file" in answer.err
    wanted = TEXT.replace("= 5", "= 7").replace("vae.safe", "a b.safe")
    assert file.read_bytes().decode() == wanted
    assert link.is_symlink()
    assert file.stat().st_mode & 0o777 == 0o600
    assert menma("config", "set", file, "training.seed=1", "training.epochs=2").code == 0
    assert menma("config", "unset", file, "training.seed", "training.epochs").code == 0
    assert file.read_bytes().decode() == wanted


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("set", "training.sed=1"), "did you mean 'training.seed'"),
        (("set", "training.seed"), "write section.key=value"),
        (("set", "training.seed=x"), "training.seed: not a TOML value"),
        (("set", "memory.weight_format=fp9"), "one of bf16"),
        (("set", "adapter.rank="), "nothing is given"),
        (("unset", "training.seed"), "does not set"),
    ],
)
def test_mistakes_leave_the_file_alone(menma, tmp_path, arguments, words):
    file = tmp_path / "fish.toml"
    file.write_text(CONFIG)
    answer = menma("config", arguments[0], file, *arguments[1:])
    assert answer.code == 2
    assert words in answer.err
    assert file.read_text() == CONFIG


def test_the_config_of_a_run_and_a_read_only_file_are_not_changed(menma, tmp_path):
    run = tmp_path / "runs" / "fish"
    run.mkdir(parents=True)
    (run / "command.json").write_text("{}")
    (run / "config.toml").write_text(CONFIG)
    answer = menma("config", "set", run / "config.toml", "training.seed=1")
    assert answer.code == 2
    assert "what a run was started with" in answer.err
    file = tmp_path / "fish.toml"
    file.write_text(CONFIG)
    file.chmod(0o444)
    answer = menma("config", "set", file, "training.seed=1")
    assert answer.code == 1
    assert "read-only" in answer.err
    assert file.read_text() == CONFIG


def test_the_editor_needs_a_file_and_a_terminal(menma, tmp_path):
    assert "not found" in menma("edit", tmp_path / "none.toml").err
    file = tmp_path / "fish.toml"
    file.write_text(CONFIG)
    answer = menma("edit", file)
    assert answer.code == 2
    assert "menma config set" in answer.err


def test_a_file_changed_or_removed_by_somebody_else_is_seen(tmp_path):
    path = tmp_path / "fish.toml"
    path.write_bytes(TEXT.encode())
    file = open_config(path)
    assert not file.changed_outside
    assert not file.is_changed
    path.write_bytes(b"\xff")
    assert file.changed_outside
    path.unlink()
    assert file.changed_outside


def test_the_list_has_every_option_of_a_complete_config_once():
    for preset in [None, *all_presets()[:2]]:
        document = ConfigDocument(render_config("fish", preset))
        keys = [option.key for option in options_of(document)]
        assert len(set(keys)) == len(keys)
        hidden = {part for one in document.spans.hidden for part in one.path[-1:]}
        assert hidden - {"preset", "sources", "loras"} <= {key.rpartition(".")[2] for key in keys}
        assert all(option.help for option in options_of(document))
    bare = {key.replace("[0]", "") for key in keys}
    arrays = {"sampling.prompts.prompt", "techniques.name", "preset"}
    assert set(BASIC) - bare <= arrays | {"model.transformer_high_noise"}


def test_values_come_from_file_preset_and_default():
    document = ConfigDocument('preset = "wan2.1-t2v-1.3b-lora"\n[training]\nseed = 1\n')
    options = {option.key: option for option in options_of(document)}
    assert options["training.seed"].value_words == "1"
    assert options["training.seed"].default_words == "42"
    assert options["model.variant"].from_preset
    assert options["model.variant"].value_words == '"wan2.1-t2v-1.3b"'
    assert options["name"].to_raw("fish") == '"fish"'
    assert options["name"].to_raw("12") == '"12"'
    assert options["memory.blocks_to_swap"].to_raw("auto") == '"auto"'
    assert options["adapter.rank"].to_raw("12") == "12"
    document.set("preset", '"none such"')
    assert options_of(document)


def test_a_text_with_mistakes_has_its_line_in_the_problem(tmp_path):
    path = tmp_path / "fish.toml"
    for text, line in (("a = 1\nb = \n", 2), ('a = """\n\n', 3), ("x = " + "[" * 9999, None)):
        with pytest.raises(ConfigError, match="not valid TOML") as caught:
            load_config_with_sources(path, text=text)
        assert caught.value.problems[0].line == line


@pytest.mark.parametrize("name", ["x" * 5000, "\\\\u0000", "/proc/1/mem", "/", ""])
def test_paths_that_no_file_can_have_are_problems(tmp_path, name):
    text = CONFIG + f'[distributed]\nhostfile = "{name}"\n'
    assert check_text(text, tmp_path / "a.toml", None).problems
    text = CONFIG.replace('"vae.safetensors"', f'"{name}"')
    assert check_text(text, tmp_path / "a.toml", None).problems


def test_parts_of_a_text_for_colours():
    text = '# a\n[b] # c\nd = "e # f" # g\nh = """\ni\n"""\n'
    found = {
        (line, text.splitlines()[line][start:end], name)
        for line, parts in toml_parts(text, scan(text)).items()
        for start, end, name in parts
    }
    assert found == {
        (0, "# a", "comment"),
        (1, "[b] # c", "header"),
        (1, "# c", "comment"),
        (2, "d", "key"),
        (2, '"e # f"', "text"),
        (2, "# g", "comment"),
        (3, "h", "key"),
        (3, '"""', "text"),
        (4, "i", "text"),
        (5, '"""', "text"),
    }


def test_the_file_is_found_below_configs_and_in_runs(tmp_path, monkeypatch):
    from app.domain.config_file import find_configs

    monkeypatch.chdir(tmp_path)
    assert find_configs(Path("runs")) == []
    Path("configs/own").mkdir(parents=True)
    Path("configs/own/a.toml").write_text("")
    run = Path("runs/fish")
    run.mkdir(parents=True)
    (run / "events.jsonl").write_text("")
    (run / "config.toml").write_text("")
    assert find_configs(Path("runs")) == [Path("configs/own/a.toml"), run / "config.toml"]
