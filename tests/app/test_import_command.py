"""`menma import`: what it writes, what it says, and how it leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.contract.config_io import load_config

FOREIGN = Path(__file__).parent / "foreign"


def test_it_writes_a_config_and_a_table_of_all_keys(menma):
    answer = menma("import", str(FOREIGN / "musubi/t2v_13b.sh"))
    assert answer.code == 0
    config = Path("configs/fish.toml")
    assert load_config(config).adapter.options("kind")["rank"] == 32
    head, *rows = answer.out.splitlines()
    assert head.split() == ["KEY", "VALUE", "STATUS", "IN", "MENMA", "WHY"]
    assert any(row.split()[:3] == ["seed", "7", "carried"] for row in rows)
    assert "menma check configs/fish.toml" in answer.err
    text = config.read_text("utf-8")
    assert "rank = 32  # network_dim" in text
    assert "alpha = 1.0  # network_alpha left out: its default there" in text
    assert "# datasets[1].control_directory" in text or "control_directory = " in text


def test_json_has_stable_fields(menma):
    answer = menma("import", str(FOREIGN / "takenoko/tlora.toml"), "-o", "t.toml", "--json")
    shown = json.loads(answer.out)
    assert list(shown) == [
        "from", "name", "output", "files", "counts", "keys", "defaults", "notes",
    ]  # fmt: skip
    assert (shown["from"], shown["output"]) == ("takenoko", "t.toml")
    assert set(shown["keys"][0]) == {
        "key", "value", "status", "target", "new_value", "note", "hint", "file",
    }  # fmt: skip
    assert sum(shown["counts"].values()) == len(shown["keys"])
    assert shown["counts"]["unknown"] == 1
    assert {"target", "value", "key"} == set(shown["defaults"][0])


def test_nothing_is_overwritten_without_force(menma):
    words = ("import", str(FOREIGN / "musubi/sigma.toml"), "-o", "mine.toml")
    Path("mine.toml").write_text("# mine\n")
    answer = menma(*words)
    assert answer.code == 2
    assert "--force" in answer.err
    assert Path("mine.toml").read_text() == "# mine\n"
    assert menma(*words, "--force").code == 0
    assert Path("mine.toml").read_text() != "# mine\n"


def test_stdout_gets_the_config_alone(menma):
    answer = menma("import", str(FOREIGN / "simpletuner/config.env"), "-o", "-")
    assert answer.code == 0
    Path("out.toml").write_text(answer.out, "utf-8")
    assert load_config("out.toml").adapter.options("kind")["rank"] == 64
    assert not Path("configs").exists()


def test_a_command_line_is_an_input(menma):
    line = "accelerate launch wan_train_network.py --task t2v-14B --network_dim 8 --output_name a"
    assert menma("import", "--command", line).code == 0
    assert load_config("configs/a.toml").adapter.options("kind")["rank"] == 8
    assert menma("import", "-c", "--network_dim 6 --output_name b").code == 0
    assert load_config("configs/b.toml").adapter.options("kind")["rank"] == 6


def test_the_trainer_can_be_named(menma):
    Path("odd.toml").write_text("some_key = 1\n")
    assert menma("import", "odd.toml").code == 2
    answer = menma("import", "odd.toml", "--from", "musubi", "--json")
    assert answer.code == 0
    assert json.loads(answer.out)["keys"][0]["status"] == "unknown"
    assert menma("import", "odd.toml", "--from", "kohya").code == 2


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"= 1"])
def test_what_cannot_be_read_leaves_with_2(menma, content):
    Path("bad.toml").write_bytes(content)
    answer = menma("import", "bad.toml")
    assert (answer.code, answer.out) == (2, "")
    assert "bad.toml" in answer.err
    assert menma("import", "missing.toml").code == 2
    assert menma("import").code == 2


def test_files_beside_the_imported_one_are_found(menma, tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "vae.safetensors").touch()
    (folder / "options.toml").write_text('vae = "vae.safetensors"\ndit = "dit.safetensors"\n')
    (folder / "run.sh").write_text("python wan_train_network.py --config_file options\n")
    answer = menma("import", str(folder / "run.sh"), "-o", "c.toml", "--json")
    rows = {row["key"]: row for row in json.loads(answer.out)["keys"]}
    assert rows["vae"]["new_value"] == str(folder / "vae.safetensors")
    assert rows["dit"]["new_value"] == "dit.safetensors"
    assert rows["dit"]["file"] == str(folder / "options.toml")
