"""`menma sample` with --vary, --matrix, --wildcards and --interactive, as far as the app goes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from app.cli import sample_session
from app.cli.main import run
from app.cli.sample_sheet_options import sheet_fields, sheet_folder, wildcard_settings
from app.runs import child
from trainer.contract.errors import UserError

CONFIG = """
name = "cats"
[model]
variant = "wan2.1-t2v-1.3b"
transformer = "t.safetensors"
vae = "v.safetensors"
text_encoder = "e.safetensors"
"""
TRAINER = """
import json, sys
def say(kind, **fields):
    print(json.dumps({"v": 1, "time": 0, "type": kind, **fields}), flush=True)
request = json.load(open(sys.argv[2]))
open("request.json", "w").write(json.dumps([sys.argv[1], request]))
if "--broken" in sys.argv or request["set"] == ["training.seed=1"]:
    print("error: no such model", file=sys.stderr)
    say("error", message="no such model")
    sys.exit(2)
say("phase", name="ready")
made = 0
for line in sys.stdin:
    message = json.loads(line)
    if message.get("stop"):
        say("log", message="stopped")
    elif message["prompt"]["prompt"] == "slow":
        say("log", message="working")
        continue  # ready comes with the stop
    elif message["prompt"]["prompt"] == "bad":
        say("error", message="cannot", hint="", of_line=True)
    else:
        made += 1
        say("sample", path=f"out/{made}.mp4", prompt=message["prompt"]["prompt"], seed=1)
    say("phase", name="ready")
say("end", reason="done")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in "tve":
        Path(f"{name}.safetensors").touch()
    Path("c.toml").write_text(CONFIG, encoding="utf-8")
    Path("fake.py").write_text(TRAINER, encoding="utf-8")
    monkeypatch.setattr(child, "TRAINER", (sys.executable, str(tmp_path / "fake.py")))
    return tmp_path


REQUEST = {"config": "c.toml", "prompts": [], "prompts_file": None, "output": "samples"}


def test_options_make_the_request_of_a_sheet(folder: Path) -> None:
    fields = sheet_fields(REQUEST, ["cfg=3,5", "seed=1..2"], None, "cfg")
    assert fields == {
        "axes": [
            {"key": "guidance_scale", "values": (3.0, 5.0)}, {"key": "seed", "values": (1, 2)},
        ],
        "columns": "guidance_scale",
    }  # fmt: skip
    chosen = sheet_folder(REQUEST | fields, None)
    assert re.fullmatch("sheet-guidance_scale-seed-[0-9a-f]{6}", chosen.name)
    assert chosen.parent == Path("samples")
    assert sheet_folder(REQUEST | fields, None) == chosen
    other = REQUEST | fields | {"prompts": [{"prompt": "b"}]}
    assert sheet_folder(other, None) != chosen, "another page would replace this one"
    assert sheet_folder(REQUEST | fields, Path("x")) == Path("x")
    assert sheet_fields(REQUEST, None, None, None) == {}


def test_an_option_wins_over_the_matrix_file(folder: Path) -> None:
    Path("m.toml").write_text(
        '[[prompts]]\nprompt = "a"\n[vary]\nseed = [1]\nsteps = [2]\n', encoding="utf-8"
    )
    fields = sheet_fields(REQUEST, ["seed=7"], Path("m.toml"), None)
    assert [(axis["key"], axis["values"]) for axis in fields["axes"]] == [
        ("num_steps", (2,)), ("seed", (7,)),
    ]  # fmt: skip
    assert fields["prompts"] == [{"prompt": "a"}]
    given = REQUEST | {"prompts": [{"prompt": "b"}]}
    assert "prompts" not in sheet_fields(given, None, Path("m.toml"), None)


def test_mistakes_of_options(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty.toml").write_text("", encoding="utf-8")
    for words, arguments in (
        ("--columns needs a sheet", ["--columns", "seed"]),
        ("varies nothing", ["--matrix", "empty.toml"]),
        ("unknown key 'sede'", ["--vary", "sede=1"]),
        ("without --vary", ["--interactive", "--vary", "seed=1"]),
        ("without --prompt", ["--interactive"]),
    ):
        assert run(["sample", "c.toml", "--prompt", "a", *arguments]) == 2
        assert words in capsys.readouterr().err
    with pytest.raises(UserError, match="at once"):
        wildcard_settings(False, Path("x"))
    assert wildcard_settings(None, Path("x")) == {"wildcards": True, "wildcards_folder": "x"}
    assert wildcard_settings(None, None) == {"wildcards": None, "wildcards_folder": None}


def session(monkeypatch: pytest.MonkeyPatch, lines: str | bytes, *arguments: str) -> int:
    read, write = os.pipe()
    os.write(write, lines.encode() if isinstance(lines, str) else lines)
    os.close(write)
    with os.fdopen(read) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        return run(["sample", "c.toml", "--interactive", *arguments])


def test_each_line_of_a_pipe_is_a_sample(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = "a cat --f 5\n\n# nothing\na dog --x 3\nbad\na bird --d 4\n"
    assert session(monkeypatch, lines, "--wildcards", "--lora", "t.safetensors:0.5") == 1
    said = capsys.readouterr()
    assert said.out.split() == ["out/1.mp4", "out/2.mp4"]
    assert "error: line 4: --x: unknown flag" in said.err
    assert "error: line 5: cannot" in said.err
    assert "2 lines made no sample" in said.err
    job, request = json.loads(Path("request.json").read_text())
    assert job == "sample_session"
    assert request["set"] == ["sampling.wildcards=true"]
    assert request["loras"][0]["strength"] == 0.5
    assert session(monkeypatch, "a cat\n", "--json") == 0
    assert json.loads(capsys.readouterr().out)["path"] == "out/1.mp4"


def test_a_line_that_is_no_text_is_one_mistake(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert session(monkeypatch, b"a cat\na caf\xe9\na bird\n") == 1
    said = capsys.readouterr()
    assert said.out.split() == ["out/1.mp4", "out/2.mp4"]
    assert "error: line 2: prompt: holds what is no UTF-8 text" in said.err


def test_models_that_cannot_be_used_end_it_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert session(monkeypatch, "a cat\n", "--set", "training.seed=1") == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("no such model") == 1


def test_the_history_of_what_was_typed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = iter(["a cat", KeyboardInterrupt, "a dog", EOFError])

    def read(_prompt: str) -> str:
        what = next(typed)
        if isinstance(what, str):
            return what
        raise what

    monkeypatch.setenv("XDG_STATE_HOME", str(folder / "state"))
    monkeypatch.setattr("builtins.input", read)
    assert list(sample_session._typed_lines()) == ["a cat", "a dog"]
    capsys.readouterr()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_ctrl_c_stops_the_sample_and_not_the_session(folder: Path) -> None:
    code = (
        "import sys; from app.runs import child; from app.cli.main import run; "
        f"child.TRAINER = (sys.executable, {str(folder / 'fake.py')!r}); "
        "sys.exit(run(['sample', 'c.toml', '--interactive']))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=child.child_environment(),
    ) as process:
        assert process.stdin
        assert process.stderr
        process.stdin.write("slow\na cat\n")
        process.stdin.close()
        process.stdin = None
        said: list[str] = []
        while "working" not in "".join(said):
            said.append(process.stderr.readline())
            assert said[-1], "".join(said)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert out.split() == ["out/1.mp4"], err
    assert "stopped" in err
    assert process.returncode == 1  # one line made no sample
