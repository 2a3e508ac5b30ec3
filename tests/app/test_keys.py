"""The user's file of keys and themes: what it changes, what it may not, and what it is told."""

from __future__ import annotations

import asyncio
import json
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from screens import screen_text

from app.domain.app_memory import remembered_theme
from app.domain.app_settings import COLOURS, GROUNDS, contrast, pale_words, read_settings
from app.tui.app import MenmaApp
from app.tui.keyed import Keyed, shown
from app.tui.keymap import PRESETS, QUIT, Action, all_actions, key_map, normal_key
from app.tui.keys_file import default_text
from app.tui.preferences import Preferences, first_theme, read_preferences
from app.tui.sources import Sources
from app.tui.theme import TERMINAL, THEMES, own_theme, theme_colours


@pytest.fixture(scope="module")
def actions() -> list[Action]:
    return all_actions()


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Return where the user's file is; what the app remembers is in the same folder."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    path = tmp_path / "config/menma/app.toml"
    path.parent.mkdir(parents=True)
    return path


def keys_in(actions, keys, place):
    """Return key -> actions, as they work together on one screen."""
    found: dict[str, list[str]] = {}
    for action in actions:
        if action.place in {place, "app", "list"}:
            for key in keys[action.id]:
                found.setdefault(key, []).append(action.id)
    return found


def screens_of(actions):
    return {a.place for a in actions if not a.is_modal}


def test_every_binding_of_ours_has_a_name_of_its_own(actions):
    names = [action.id for action in actions]
    assert len(names) == len(set(names))
    assert {"quit", "jobs.stop", "monitor.cursor-left", "config.save", "list.down"} <= set(names)
    by_name = {action.id: action for action in actions}
    assert by_name["config.save"].keys == ("w", "ctrl+s")
    assert by_name["jobs.stop"].help.startswith("Stop what runs on this line")
    for owner in Keyed.keyed_classes:
        for binding in owner.BINDINGS:
            assert binding.id in by_name, (owner, binding)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_speak_of_actions_that_there_are_and_nothing_is_twice(actions, preset):
    found = key_map(actions, {"preset": preset})
    assert found.problems == ()
    assert set(PRESETS[preset]) <= {action.id for action in actions}
    for place in screens_of(actions):
        twice = {k: i for k, i in keys_in(actions, found.keys, place).items() if len(i) > 1}
        assert twice == {}, place


def test_no_default_is_a_key_of_multiplexers_or_a_double(actions):
    taken = {"ctrl+b", "ctrl+a", "ctrl+j", "ctrl+m", "ctrl+h", "ctrl+i", "space"}
    for action in actions:
        letters = [key for key in action.keys if key not in taken]
        assert letters, f"{action.id} is on {action.keys} only"


@given(
    st.dictionaries(
        st.sampled_from(["quit", "jobs.stop", "jobs.save", "list.down", "theme", "preset", "no"]),
        st.one_of(
            st.sampled_from(["q", "S", "j", "x", "vim", "ctrl+x", "nokey", "", "?,q", "q, j"]),
            st.lists(st.sampled_from(["q", "S", "T", "", "comma"]), max_size=3),
            st.integers(),
        ),
    )
)
def test_whatever_is_written_the_app_can_be_left_and_no_key_does_two_things(wishes):
    actions = all_actions()
    found = key_map(actions, wishes)
    for place in screens_of(actions):
        keys = keys_in(actions, found.keys, place)
        assert [key for key in found.keys[QUIT] if keys[key] == [QUIT]], (place, found)
        assert all(len(ids) == 1 for ids in keys.values()), keys


def test_keys_can_change_places(actions):
    found = key_map(actions, {"jobs": {"save": "s", "sample": "b"}})
    assert found.problems == ()
    assert found.changed == {"jobs.save": "s", "jobs.sample": "b"}


@pytest.mark.parametrize(
    ("wishes", "words"),
    [
        ({"jobs.stpo": "x"}, "there is no action 'jobs.stpo': did you mean 'jobs.stop'?"),
        ({"jobs.stop": "ctr+x"}, "jobs.stop: 'ctr+x' is no key"),
        ({"jobs.stop": "b"}, "jobs.stop and jobs.save are both on b in jobs; jobs.stop stays on S"),
        ({"jobs.stop": "q"}, "quit and jobs.stop are both on q in jobs; jobs.stop stays on S"),
        ({"quit": ""}, "quit: it needs a key"),
        ({"quit": "j"}, "quit and list.down are both on j in app; quit stays on q"),
        ({"jobs.stop": 3}, "jobs.stop: a key is written as text"),
        ({"jobs.stop": "ctrl+i"}, "most terminals cannot tell ctrl+i from tab"),
        ({"preset": "emacs"}, "there is no 'emacs'; one of: default, vim"),
    ],
)
def test_what_cannot_be_is_told_in_words(actions, wishes, words):
    assert words in "\n".join(key_map(actions, wishes).problems)


def test_names_of_keys():
    names = {"?": "question_mark", "+": "plus", "S": "S", "comma": "comma", "ctrl+x": "ctrl+x",
             "shift+left": "shift+left", "f5": "f5", " ": None, "": None, "ctrl+": None,
             "nokey": None, "full_stop": "full_stop", "alt+?": "alt+question_mark"}  # fmt: skip
    assert {key: normal_key(key) for key in names} == names
    assert [shown(k) for k in ("question_mark", "escape", "ctrl+x")] == ["?", "escape", "ctrl+x"]


def test_the_written_file_changes_nothing_and_its_lines_can_be_taken_as_they_are(file, actions):
    text = default_text(actions)
    file.write_text(text)
    assert read_preferences().problems == ()
    assert read_preferences().keys == {}
    settings = [line[2:] for line in text.splitlines() if line.startswith("# ") and " = " in line]
    body = [line for line in settings if not line.startswith(('theme = "menma', "preset"))]
    place = body.index('base = "dark"')
    whole = "[keys]\n" + "\n".join(body[:place]) + "\n[themes.mine]\n" + "\n".join(body[place:])
    assert len(tomllib.loads(whole)["keys"]) == len(actions)
    file.write_text(whole)
    again = read_preferences()
    assert (again.problems, again.keys) == ((), {})
    assert theme_colours(again.themes[-1]) == theme_colours(THEMES[0])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("theme = 3", "the name of a theme is a text"),
        ('theme = "menma-drak"', "did you mean 'menma-dark'?"),
        ("[kyes]", "there is no 'kyes' here: did you mean 'keys'?"),
        ("keys = 1", "keys: it is a table, written [keys]"),
        ("[keys", "it is not valid TOML"),
        ("[themes.x]\nbase = 'dim'", "themes.x.base: there is no 'dim'"),
        ("[themes.x]\nprimry = '#ffffff'", "did you mean 'primary'?"),
        ("[themes.x]\nprimary = 'blue'", "themes.x.primary: 'blue' is no colour"),
        ("[themes.'A b']", "a theme is a table [themes.NAME]"),
        ("[themes.menma-dark]", "there is a theme of this name already"),
        ("[themes.x]\nprimary = '#202020'", "primary on panel: contrast 1.2, 4.5 is needed"),
    ],
)
def test_a_file_that_is_wrong_is_told_and_starts_the_app_all_the_same(file, text, words):
    file.write_text(text)
    preferences = read_preferences()
    assert words in "\n".join(preferences.problems)
    assert first_theme(preferences) in {TERMINAL, *(theme.name for theme in preferences.themes)}


def test_a_file_that_cannot_be_decoded_is_told(file):
    file.write_bytes(b"\xff\xfe")
    assert "it cannot be read" in read_settings().problems[0]


def test_which_theme_is_first(file, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    file.write_text("[themes.mine]\nbase = 'light'\nprimary = '#00005f'\n")
    assert first_theme(read_preferences()) == "menma-dark"
    state = file.parents[2] / "state/menma/app.json"
    state.parent.mkdir(parents=True)
    state.write_text('{"theme": "mine"}')
    assert first_theme(read_preferences()) == "mine"
    state.write_text('{"theme": "gone"}')
    assert first_theme(read_preferences()) == "menma-dark"
    monkeypatch.setenv("TERM", "linux")
    assert first_theme(read_preferences()) == TERMINAL
    file.write_text("theme = 'menma-light'")
    assert first_theme(read_preferences()) == "menma-light"
    state.write_text("nonsense")
    assert remembered_theme() == ""


@pytest.mark.parametrize("theme", THEMES, ids=lambda theme: theme.name)
def test_contrast_of_our_themes(theme):
    colours = theme_colours(theme)
    assert pale_words(colours) == []
    for word in set(COLOURS) - set(GROUNDS):
        assert contrast(colours[word], colours["background"]) >= 4.5
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)  # WCAG's own example


@pytest.mark.parametrize("theme", THEMES, ids=lambda theme: theme.name)
def test_in_256_colours_it_is_nearly_the_same_and_can_be_read(theme):
    """Rich picks out of the 256 what Textual then draws; greys may come out one step darker."""
    from rich.color import Color, ColorSystem

    quantised = {
        name: Color.parse(colour).downgrade(ColorSystem.EIGHT_BIT).get_truecolor()
        for name, colour in theme_colours(theme).items()
    }
    for name, colour in theme_colours(theme).items():
        parts = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
        assert max(abs(a - b) for a, b in zip(parts, quantised[name], strict=True)) <= 10, name
    assert pale_words({name: colour.hex for name, colour in quantised.items()}) == []


def test_own_theme_takes_what_it_leaves_out_from_its_base(file):
    file.write_text("[themes.mine]\nbase = 'light'\nprimary = '#00005F'\n")
    (own,) = read_settings().themes
    theme = own_theme(own)
    assert (theme.primary, theme.background, theme.dark) == ("#00005f", "#ffffff", False)


def test_in_the_app_keys_and_theme_are_the_users_and_problems_are_shown(file, tmp_path):
    file.write_text(
        'theme = "mine"\n[keys]\n"jobs.pause" = "F"\nshow-system = "f6"\ntheme = "M"\n'
        '"jobs.nothing" = "x"\n[themes.mine]\nbase = "light"\n'
    )

    async def work() -> None:
        sources = Sources(tmp_path / "runs", tmp_path / "queue")
        app = MenmaApp(sources, preferences=read_preferences())
        async with app.run_test(size=(100, 24), notifications=True) as pilot:

            async def seen(words: str) -> None:
                for _ in range(1200):
                    if words in screen_text(app):
                        return
                    await pilot.pause(0.05)
                raise AssertionError(screen_text(app))

            assert app.theme == "mine"
            await seen("jobs.nothing")
            await seen("f6 Sys")
            await pilot.press("P")
            await pilot.press("F")
            await seen("queue paused")
            await pilot.press("M")
            assert app.theme == TERMINAL
            assert remembered_theme() == TERMINAL
            await pilot.press("q")
        assert app.return_code == 0

    asyncio.run(work())


def test_without_preferences_nothing_is_remembered(file, tmp_path):
    async def work() -> None:
        app = MenmaApp(Sources(tmp_path / "runs", tmp_path / "queue"), preferences=Preferences())
        async with app.run_test() as pilot:
            await pilot.press("T")

    asyncio.run(work())
    assert remembered_theme() == ""


def test_the_command_lists_writes_and_tells(menma, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    path = tmp_path / "xdg/menma/app.toml"
    code, out, err = menma("keys")
    assert code == 0
    assert "jobs.stop" in out
    assert str(path) in err
    assert menma("keys", "--write").out == f"{path}\n"
    code, _, err = menma("keys", "--write")
    assert (code, "is there already" in err) == (2, True)
    path.write_text('[keys]\n"jobs.stop" = "X"\nnothing = "a"\n')
    assert menma("keys", "--write").code == 2
    code, out, _ = menma("keys", "--json")
    answer = json.loads(out)
    (stop,) = [entry for entry in answer["keys"] if entry["action"] == "jobs.stop"]
    assert (stop["keys"], stop["default"], stop["where"]) == (["X"], ["S"], "jobs")
    assert answer["problems"][0].startswith("keys: there is no action 'nothing'")
    assert "there is no action 'nothing'" in menma("keys").err
    assert menma("keys", "--write", "--force").code == 0
    assert json.loads(menma("keys", "--json").out)["problems"] == []
