"""A preset is picked for a config: what it would change, applied as one edit, and taken back."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from conftest import CONFIG
from screens import screen_text
from textual.widgets import Input

from app.domain import cards
from app.domain.cards import Card
from app.domain.config_document import ConfigDocument
from app.domain.preset_choice import choose_preset
from app.domain.preset_offers import all_offers, offer_of
from app.domain.presets import all_presets, read_preset
from app.tui.app import MenmaApp
from app.tui.screens.config import card_choice, view
from app.tui.screens.config.preset_picker import PresetPicker
from app.tui.sources import Sources
from trainer.contract.memory_model import gpu_of_memory

NAME = "wan2.1-t2v-1.3b-motion-12gb"
TEXT = CONFIG.replace('name = "fish"\n', '# mine\r\nname = "fish"  # a run\n').replace(
    "max_steps = 5", "max_steps = 5  # few\n\n[adapter]\nrank = 8 # small\n# alpha ="
)


def test_what_the_file_sets_stays_or_gives_way():
    preset, path = read_preset(NAME), Path("x.toml")
    stays = choose_preset(TEXT, path, preset, None, give_way=False)
    assert stays.problem == ""
    assert stays.changes["lr_schedule.warmup_steps"] == (0, 50)
    assert "training.max_steps" not in stays.changes
    assert stays.kept["training.max_steps"] == (5, 2400)
    assert stays.checked.estimate is not None
    gives = choose_preset(TEXT, path, preset, None, give_way=True)
    assert gives.kept == {}
    assert gives.changes["training.max_steps"] == (5, 2400)
    assert gives.changes["adapter.rank"] == (8, preset.values["adapter"]["rank"])
    assert "rank" not in gives.text
    for choice in (stays, gives):
        document = ConfigDocument(TEXT)
        document.replace_all(choice.text)
        assert document.value("preset") == NAME
        assert set(TEXT.splitlines()) - set(choice.text.splitlines()) <= {
            "max_steps = 5  # few", "rank = 8 # small",
        }  # fmt: skip
        document.undo()
        assert document.text == TEXT


def test_a_second_preset_takes_the_place_of_the_first():
    first = choose_preset(TEXT, Path("x.toml"), read_preset(NAME), None, give_way=False).text
    other = read_preset("wan2.1-t2v-1.3b-style-16gb")
    second = choose_preset(first, Path("x.toml"), other, None, give_way=False)
    assert ConfigDocument(second.text).content()["preset"] == other.name
    assert second.text == first.replace(NAME, other.name)


@pytest.mark.parametrize(
    ("text", "words"),
    [("[model\n", "not valid TOML"), ("[training]\nmax_step = 3\n", "the config has problems")],
)
def test_a_config_with_mistakes(text, words):
    choice = choose_preset(text, Path("x.toml"), read_preset(NAME), None, give_way=False)
    assert words in choice.problem
    assert choice.changes == {}


def test_presets_for_the_model_come_first_and_are_judged():
    card = Card(gpu=gpu_of_memory(11.8))
    offers = all_offers(card, "wan2.1-t2v-1.3b")
    assert len(offers) == len(all_presets())
    fitting = [offer.preset.variant == "wan2.1-t2v-1.3b" for offer in offers]
    assert fitting == sorted(fitting, reverse=True)
    assert offer_of(read_preset(NAME), card).verdict == "fits"
    assert offer_of(read_preset("wan2.1-t2v-14b-lora"), card).verdict_words == "no"
    assert [o.preset.name for o in offers if o.matches("motion 8x80")] == [
        "wan2.1-t2v-14b-motion-8x80gb"
    ]


@pytest.fixture
def place(tmp_path: Path, monkeypatch) -> Path:
    """Return a folder with a config; the machine has a GPU of 12 GB."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    here = Card(gpu=gpu_of_memory(11.8, "RTX 3060"), here=True)
    monkeypatch.setattr(card_choice, "choose_card", lambda name, size: here)
    monkeypatch.setattr(cards, "ram_bytes", lambda: 64 * 2**30)
    monkeypatch.setattr(view, "DEBOUNCE_S", 0.01)
    (tmp_path / "configs").mkdir()
    (tmp_path / "clips").mkdir()
    for name in ("transformer", "vae", "text_encoder"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"x")
    Path("configs/fish.toml").write_bytes(TEXT.encode())
    return tmp_path


async def seen(pilot, app: MenmaApp, words: str) -> str:
    for _ in range(1200):
        text = screen_text(app)
        if words in text:
            return text
        await pilot.pause(0.05)
    raise AssertionError(f"{words!r} does not come:\n{text}")


def test_it_is_filtered_compared_applied_and_undone_by_keys(place):
    mine = place / "xdg" / "menma" / "presets" / "mine.toml"
    mine.parent.mkdir(parents=True)
    mine.write_text('[preset]\ntitle = "My own"\n[training]\nmax_steps = 7\n')

    async def work() -> None:
        app = MenmaApp(Sources(Path("runs"), Path("queue").absolute()), Path("configs/fish.toml"))
        async with app.run_test(size=(80, 24)) as pilot:
            await seen(pilot, app, "no problems")
            await pilot.press("p")
            text = await seen(pilot, app, "My own")
            assert "yours: My own" in text
            assert "A preset for configs/fish.toml" in text
            await pilot.press("escape")
            await seen(pilot, app, "no problems")
            assert app.screen.file.document.text == TEXT
            await pilot.press("p")
            await seen(pilot, app, "wan2.1-t2v-1.3b-lora")
            await pilot.press("slash")
            app.screen.query_one("#preset-filter", Input).value = "14b-lora"
            await seen(pilot, app, "80  no     general, clips")
            await seen(pilot, app, "! it is for wan2.1")
            app.screen.query_one("#preset-filter", Input).value = "motion-12gb"
            await pilot.press("enter")
            text = await seen(pilot, app, "lr_schedule.warmup_steps: 0 -> 50")
            assert "12  fits   motion, clips" in text
            assert "VRAM #" in text
            await pilot.press("f")
            await seen(pilot, app, "training.max_steps: 5 -> 2400")
            await pilot.press("f")
            await seen(pilot, app, "warmup_steps: 0 -> 50")
            await pilot.press("escape")
            await seen(pilot, app, "wan2.1-t2v-1.3b-lora")
            app.screen.query_one("#preset-filter", Input).value = "nothing like this"
            await seen(pilot, app, "No preset is called so")
            app.screen.query_one("#preset-filter", Input).value = "motion-12gb"
            await seen(pilot, app, "warmup_steps: 0 -> 50")
            assert isinstance(app.screen, PresetPicker)
            await pilot.press("enter")
            await seen(pilot, app, "fish.toml *")
            document = app.screen.file.document
            assert document.value("preset") == NAME
            assert document.value("training.max_steps") == 5
            await pilot.press("u")
            assert document.text == TEXT
            await pilot.press("ctrl+r")
            assert document.value("preset") == NAME

    asyncio.run(work())
    assert Path("configs/fish.toml").read_bytes() == TEXT.encode()
