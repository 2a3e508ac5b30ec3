"""The config screen, driven by keys."""

from __future__ import annotations

import asyncio
import random
import tomllib
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import CONFIG
from screens import screen_text
from textual.pilot import Pilot
from textual.widgets import Input

from app.domain.config_options import Option, options_of
from app.queue.store import QueueStore
from app.tui.app import MenmaApp
from app.tui.screens.config import card_choice, view
from app.tui.screens.config import screen as config_screen
from app.tui.screens.config.toml_area import TomlArea
from app.tui.sources import Sources
from trainer.contract.run_dir import RunDir

SMALL, LARGE = (80, 24), (120, 40)
Steps = Callable[[Pilot, MenmaApp], Awaitable[None]]
TEXT = (
    CONFIG.replace("[training]\n", "# length\n[training]  # of the run\n# seed = 42  # fixed\n")
    + "\n[memory]\nblocks_to_swap = 4  # as few as fit\n"
)


@pytest.fixture
def place(tmp_path: Path, monkeypatch) -> Path:
    """Return a folder with a config and the files that it names; there is no GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(card_choice, "choose_card", lambda name, size: None)
    monkeypatch.setattr(view, "DEBOUNCE_S", 0.01)
    monkeypatch.setattr(config_screen, "ensure_worker", lambda folder: None)
    (tmp_path / "configs").mkdir()
    (tmp_path / "clips").mkdir()
    for name in ("transformer", "vae", "text_encoder"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"x")
    Path("configs/fish.toml").write_bytes(TEXT.encode())
    return tmp_path


def drive(
    steps: Steps, size: tuple[int, int] = SMALL, config: str | None = "configs/fish.toml"
) -> MenmaApp:
    """Open a config in the app and do something with it."""

    async def work() -> MenmaApp:
        path = None if config is None else Path(config)
        app = MenmaApp(Sources(Path("runs"), Path("queue").absolute()), path)
        async with app.run_test(size=size, notifications=True) as pilot:
            if config is not None:
                await seen(pilot, app, "basic: ")
                await seen(pilot, app, "VRAM")
            await steps(pilot, app)
        return app

    return asyncio.run(work())


async def seen(pilot: Pilot, app: MenmaApp, words: str, *, gone: bool = False) -> str:
    """Wait until words are on the screen, or no longer; return the screen."""
    for _ in range(1200):
        text = screen_text(app)
        if (words in text) is not gone:
            return text
        await pilot.pause(0.05)
    raise AssertionError(f"{words!r}, gone {gone}:\n{text}")


async def find(pilot: Pilot, app: MenmaApp, words: str) -> None:
    """Go to the first option that the words find."""
    await pilot.press("slash")
    app.screen.query_one("#filter", Input).value = words
    await pilot.press("enter")
    await seen(pilot, app, "found: ")


def saved() -> str:
    return Path("configs/fish.toml").read_bytes().decode()


GOLDEN = """\
 menma   1 Jobs  2 CONFIG  3 Mon  4 Data  5 Lib  6 Sys   configs/fish.toml
swap                                                            found: 1 of 106
 OPTION                              VALUE                   DEFAULT
 * memory.blocks_to_swap             4                       0










 memory.blocks_to_swap  auto or whole number ≥ 0
 So many of the transformer's blocks stay in RAM and are copied to the device
 when their turn comes; 0: all are on the device; `auto`: as few as the
 estimate lets fit the GPU. For LoRA, not for full fine-tunes.

 memory.blocks_to_swap = 4
 VRAM"""


def test_the_screen_as_text(place):
    async def steps(pilot, app):
        await find(pilot, app, "swap")
        await pilot.press("enter")
        text = await seen(pilot, app, "memory.blocks_to_swap = 4")
        count = text.splitlines()[1].split()[-1]  # it grows with every option
        assert text.replace(f"of {count}", "of 106").startswith(GOLDEN)
        assert "no problems" in text
        assert "no GPU here; v names one" in text

    drive(steps)


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_a_value_is_edited_undone_reset_and_saved(place, size):
    async def steps(pilot, app):
        await find(pilot, app, "swap")
        await pilot.press("enter", "backspace", *"12")
        assert saved() == TEXT, "nothing is written before it is saved"
        await pilot.press("enter")
        await seen(pilot, app, "fish.toml *")
        await pilot.press("u")
        await seen(pilot, app, "fish.toml *", gone=True)
        await pilot.press("ctrl+r")
        await seen(pilot, app, "fish.toml *")
        await find(pilot, app, "training.seed")
        await pilot.press("enter", "ctrl+u", "7", "enter")
        await pilot.press("ctrl+s")
        await seen(pilot, app, "fish.toml *", gone=True)
        wanted = TEXT.replace("swap = 4", "swap = 12").replace("# seed = 42", "seed = 7")
        assert saved() == wanted
        await find(pilot, app, "swap")
        await pilot.press("x", "d")
        text = await seen(pilot, app, "Changes that are not saved")
        assert "-blocks_to_swap = 12  # as few as fit" in text
        await pilot.press("escape", "u", "u", "u")
        await pilot.press("w")
        await seen(pilot, app, "fish.toml *", gone=True)

    drive(steps, size)
    assert saved() == TEXT


def test_what_is_typed_is_checked_and_estimated_while_it_is_typed(place):
    async def steps(pilot, app):
        await pilot.press("v", "v")
        before = await seen(pilot, app, "/ 16.0 GiB")
        assert "OK" in before
        assert "text encoder" in before
        await find(pilot, app, "weight_format")
        await pilot.press("enter", "ctrl+u", *"fp9")
        await seen(pilot, app, "one of bf16, fp32, fp8, fp8_scaled")
        await pilot.press("enter")
        assert not app.screen.has_changes
        await pilot.press("down")
        await seen(pilot, app, "weight_format = bf16")
        await pilot.press("down", "down", "enter")
        await seen(pilot, app, "fp8")
        await find(pilot, app, "sources resolution")
        await pilot.press("enter", "ctrl+u", *"[1920,1088]")
        await seen(pilot, app, "no problems")
        await pilot.press("escape")
        assert app.screen.file.document.value("memory.weight_format") == "fp8"
        await find(pilot, app, "max_steps")
        await pilot.press("enter", "backspace", *"-3")
        text = await seen(pilot, app, "greater than or equal to 1")
        assert "! line 15: training.max_steps" in text
        assert "no estimate" in text

    drive(steps)


def test_options_of_the_chosen_plug_in_tiers_and_an_empty_filter(place):
    async def steps(pilot, app):
        text = await seen(pilot, app, "basic: ")
        assert "timeout" not in text
        await pilot.press("t")
        await seen(pilot, app, "all: ")
        await pilot.press("t")
        await find(pilot, app, "eight_decay")
        await seen(pilot, app, "optimizer.weight_decay")
        await find(pilot, app, "adapter.kind")
        await pilot.press("enter", "ctrl+u", *"none", "enter")
        await find(pilot, app, "adapter.rank")
        await seen(pilot, app, "No option is called so")
        await pilot.press("enter", "x", "escape")
        await seen(pilot, app, "basic: ")
        await pilot.press("G")
        bottom = await seen(pilot, app, "output.every_steps")
        await pilot.press("g")
        assert await seen(pilot, app, "Name of the run") != bottom

    drive(steps)


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_the_text_is_the_same_config(place, size):
    async def steps(pilot, app):
        both = "[training]  # of the run" in screen_text(app)
        assert both is (size == LARGE)
        await pilot.press("tab")
        await seen(pilot, app, "[[dataset.sources]]")
        area = app.screen.query_one(TomlArea)
        area.go_to(1)
        await pilot.press("end", "left", *"22")
        await seen(pilot, app, '"fish22"')
        await pilot.press("enter", *"seed = 1")
        await seen(pilot, app, "seed")
        await pilot.press("ctrl+z", "ctrl+z", "ctrl+z")
        assert app.screen.file.document.text == TEXT
        assert area.text == TEXT
        await pilot.press("ctrl+y")
        await pilot.press("tab")
        await seen(pilot, app, '"fish22"')

    drive(steps, size)


def test_a_text_with_mistakes_stays_editable_and_is_saved_after_a_question(place):
    broken = TEXT.replace("[model]", "[model").replace("blocks_to_swap", "block_to_swap")
    Path("configs/fish.toml").write_bytes(broken.replace("\n", "\r\n").encode())

    async def steps(pilot, app):
        text = await seen(pilot, app, "! line 3: not valid TOML")
        assert "VRAM: no estimate" in text
        await find(pilot, app, "max_steps")
        await pilot.press("enter", "ctrl+u", *"50", "enter", "w")
        await seen(pilot, app, "It is not valid TOML")
        await pilot.press("escape")
        assert "max_steps = 5\r" in saved()
        await pilot.press("w")
        await seen(pilot, app, "It is not valid TOML")
        await pilot.press("y")
        await seen(pilot, app, "fish.toml *", gone=True)
        assert saved() == broken.replace("= 5\n", "= 50\n").replace("\n", "\r\n")
        await pilot.press("r")
        await seen(pilot, app, "It has problems")
        await pilot.press("exclamation_mark")
        await seen(pilot, app, "1 problem")
        await pilot.press("enter", "end", "right_square_bracket")
        await seen(pilot, app, "! line 18: memory")
        (problem,) = app.screen.checked.problems
        assert (problem.key, problem.hint) == (
            "memory.block_to_swap",
            "did you mean 'blocks_to_swap'?",
        )

    drive(steps)


def test_a_read_only_file_and_one_that_somebody_else_has_changed(place):
    async def steps(pilot, app):
        await pilot.press("x", "w")  # the name
        await seen(pilot, app, "fish.toml *", gone=True)
        Path("configs/fish.toml").chmod(0o444)
        await pilot.press("u", "w")
        await seen(pilot, app, "is read-only")
        assert app.screen.has_changes
        Path("configs/fish.toml").chmod(0o640)
        Path("configs/fish.toml").write_text("# theirs\n")
        await pilot.press("w")
        await seen(pilot, app, "by another program")
        await pilot.press("escape")
        assert saved() == "# theirs\n"
        await pilot.press("w")
        await seen(pilot, app, "by another program")
        await pilot.press("y")
        await seen(pilot, app, "fish.toml *", gone=True)

    drive(steps)
    assert saved() == TEXT
    assert Path("configs/fish.toml").stat().st_mode & 0o777 == 0o640


def test_changes_are_not_lost_without_a_question(place):
    async def steps(pilot, app):
        await pilot.press("x", "1", "2")
        await seen(pilot, app, "fish.toml *")
        await pilot.press("o")
        await seen(pilot, app, "not saved")
        await pilot.press("escape", "q")
        await seen(pilot, app, "Leave without them")
        await pilot.press("q", "escape")
        assert app.is_running
        await pilot.press("q")
        await seen(pilot, app, "Leave without them")
        await pilot.press("y")

    drive(steps)
    assert saved() == TEXT


def test_a_file_is_chosen_and_that_of_a_run_is_copied(place):
    run = RunDir(place / "runs" / "fish")
    run.root.mkdir(parents=True)
    run.events.write_text("")
    run.config.write_text(TEXT)

    async def steps(pilot, app):
        await pilot.press("2")
        text = await seen(pilot, app, "Open a config")
        assert "configs/fish.toml" in text
        await pilot.press("j", "enter")
        await seen(pilot, app, "configs/fish-2.toml *")
        await pilot.press("w")
        await seen(pilot, app, "fish-2.toml *", gone=True)

    drive(steps, config=None)
    assert Path("configs/fish-2.toml").read_text() == TEXT == run.config.read_text()


def test_without_a_config_and_with_one_that_is_not_text(place):
    Path("configs/fish.toml").write_bytes(b"\xff\xfe")

    async def broken(pilot, app):
        await pilot.press("2", "enter")
        await seen(pilot, app, "cannot read")
        await pilot.press(*"wdcerux!tv")
        await pilot.press("exclamation_mark", "tab", "tab", "enter", "slash", "escape")
        Path("configs/fish.toml").unlink()
        await pilot.press("o")
        await seen(pilot, app, "There is no config yet")

    drive(broken, config=None)


def test_it_is_queued_and_its_commands_are_shown(place):
    async def steps(pilot, app):
        await pilot.press("c")
        text = await seen(pilot, app, "Commands of")
        assert "menma train configs/fish.toml" in text
        await pilot.press("escape", "x", "r")
        await seen(pilot, app, "Save them first?")
        await pilot.press("y")
        await seen(pilot, app, "queue cache, train, sample")
        await pilot.press("enter")
        await seen(pilot, app, "Queued as jobs 1, 2, 3")

    drive(steps)
    jobs = QueueStore(place / "queue").jobs()
    assert [job.spec.argv for job in jobs] == [
        ("cache", "configs/fish.toml"),
        ("train", "configs/fish.toml"),
        ("sample", "runs/lora"),
    ]
    assert jobs[2].spec.after == (2,)


@pytest.mark.parametrize("code", [0, 2])
def test_it_is_trained_with_the_command_of_the_command_line(place, monkeypatch, code):
    asked = []

    def run(argv, **options):
        asked.append(argv[-3:])
        return SimpleNamespace(returncode=code, stdout="runs/fish", stderr="words of train")

    monkeypatch.setattr(config_screen.subprocess, "run", run)

    async def steps(pilot, app):
        await pilot.press("r")
        await seen(pilot, app, "train now")
        await pilot.press("k", "enter")
        await seen(pilot, app, "words of train")

    drive(steps)
    assert asked == [["train", "configs/fish.toml", "--detach"]]


def test_another_editor_makes_one_edit(place, monkeypatch):
    from contextlib import nullcontext

    async def steps(pilot, app):
        await pilot.press("e")
        await seen(pilot, app, "cannot be lent")
        monkeypatch.setattr(app, "suspend", nullcontext)
        monkeypatch.setenv("VISUAL", "sed -i s/fish/cat/")
        await pilot.press("e")
        await seen(pilot, app, '"cat"')
        await pilot.press("u")
        await seen(pilot, app, '"cat"', gone=True)
        monkeypatch.setenv("VISUAL", "false")
        await pilot.press("e")
        await seen(pilot, app, "ended with an error")
        monkeypatch.setenv("VISUAL", "/no/editor")
        await pilot.press("e")
        await seen(pilot, app, "the editor")
        assert app.screen.file.document.text == TEXT

    drive(steps)


def sample(option: Option, layout: random.Random) -> str:
    """Return something that may be typed for an option."""
    if option.choices:
        return layout.choice(option.choices)
    number, allowed = str(layout.randrange(1, 1000)), option.allowed
    typed = "[]" if "list" in allowed else "{}" if "table" in allowed else "some words"
    return number if "number" in allowed and "list" not in allowed else typed


def plain(typed: str) -> object:
    """Return what is meant by it."""
    try:
        return tomllib.loads(f"value = {typed}")["value"]
    except tomllib.TOMLDecodeError:
        return typed


def test_two_hundred_edits_through_the_form_and_undo(place):
    """Through the screen's own way of taking values; keys alone would take minutes."""
    layout = random.Random(3)

    async def steps(pilot, app):
        screen = app.screen
        document = screen.file.document
        num_edits = 0
        while num_edits < 200:
            option = layout.choice(options_of(document))
            before = document.text
            if option.is_changed and layout.random() < 0.3:
                document.remove(option.key)
            else:
                typed = sample(option, layout)
                document.set(option.key, option.to_raw(typed))
                assert str(document.value(option.key)).lower() == str(plain(typed)).lower()
            num_edits += document.text != before
            tomllib.loads(document.text)
        screen.show_document()
        await pilot.pause()
        assert screen.query_one(TomlArea).text == document.text
        while document.can_undo:
            await pilot.press("u") if layout.random() < 0.1 else document.undo()
        screen.show_document()
        await pilot.pause()
        assert screen.query_one(TomlArea).text == TEXT
        assert not screen.has_changes

    drive(steps, LARGE)
