"""Wildcards: every template becomes one of the prompts that it describes, by its seed."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from itertools import permutations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.contract.config import Prompt, SamplingSection
from trainer.contract.errors import ConfigError
from trainer.contract.variants import get_variant
from trainer.contract.wildcards import Wildcards, escape
from trainer.sampling.requests import SampleRequest, requests_of
from trainer.sampling.results import describe

NO_FILES = Wildcards(Path("there-is-none"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "colours").mkdir()
    (tmp_path / "place.txt").write_text(
        "\ufeff# where\nin the __weather__\n\n3::on {a|the} hill\n", encoding="utf-8"
    )
    (tmp_path / "weather.txt").write_text("rain\nsnow\n", encoding="utf-8")
    (tmp_path / "colours/warm.txt").write_text("red\n", encoding="utf-8")
    (tmp_path / "colours/cold.txt").write_text("blue\n", encoding="utf-8")
    return tmp_path


def results(template: str, wildcards: Wildcards = NO_FILES, num: int = 200) -> set[str]:
    return {wildcards.expand(template, seed) for seed in range(num)}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("a cat", {"a cat"}),
        ("a {red|blue} cat", {"a red cat", "a blue cat"}),
        ("{big |}cat", {"big cat", "cat"}),
        ("{only}", {"only"}),
        ("{a {b|c}|d}", {"a b", "a c", "d"}),
        ("{0::a|b}", {"b"}),
        ("{2$$a|b|c}", {f"{x}, {y}" for x, y in permutations("abc", 2)}),
        ("{2$$ and $$a|b|c}", {f"{x} and {y}" for x, y in permutations("abc", 2)}),
        ("{0-1$$a|b}", {"", "a", "b"}),
        ("{1-$$-$$a|b}", {"a", "b", "a-b", "b-a"}),
        ("{-1$$a|b}", {"", "a", "b"}),
        ("{2$${a|b}|c}", {"a, c", "b, c", "c, a", "c, b"}),
        (r"\{a\|b\} \_\_x\_\_ \\ 5$ |", r"{a|b} __x__ \ 5$ |"),
        (r"a\b", r"a\b"),
        (r"\${a|b}", {"$a", "$b"}),
        ("__ a __", {"__ a __"}),
    ],
)  # fmt: skip
def test_grammar(template: str, expected: set[str] | str) -> None:
    assert results(template) == ({expected} if isinstance(expected, str) else expected)


def test_files(folder: Path) -> None:
    wildcards = Wildcards(folder)
    assert results("a cat __place__", wildcards) == {
        "a cat in the rain", "a cat in the snow", "a cat on a hill", "a cat on the hill",
    }  # fmt: skip
    assert results("__colours/*__", wildcards) == {"red", "blue"}
    assert results("__colours/warm__ {__weather__|sun}", wildcards) == {
        "red rain", "red snow", "red sun",
    }  # fmt: skip


def test_weights_are_odds() -> None:
    num = 4000
    counts = Counter(NO_FILES.expand("{3::a|b|0.5::c|.5::d}", seed) for seed in range(num))
    for letter, weight in {"a": 3, "b": 1, "c": 0.5, "d": 0.5}.items():
        share = weight / 5
        deviation = (share * (1 - share) / num) ** 0.5
        assert abs(counts[letter] / num - share) < 4 * deviation


def test_the_draw_is_the_same_everywhere() -> None:
    """blake2b of `prompt:7:0`, as a fraction of 2^64, is 0.358; of `negative:7:0`, 0.854."""
    assert NO_FILES.expand("{a|b|c|d|e|f|g|h|i|j}", 7) == "d"
    assert NO_FILES.expand("{a|b|c|d|e|f|g|h|i|j}", 7, "negative") == "i"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("a {b|c", "not closed.*character 3"),
        ("a } b", "without its {"),
        ("{3$$a|b}", "3 of 2"),
        ("{2-1$$a|b|c}", "2 to 1"),
        ("{0::a|0::b}", "weight 0"),
        ("${x=a}", "variables"),
        ("{" * 14 + "a" + "}" * 14, "deep"),
        ("__none__", "no file.*none.txt"),
        ("__a/../../secret__", "leads out"),
        ("__a**__", r"\*\*"),
    ],
)
def test_mistakes(template: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        NO_FILES.expand(template, 1)


def test_mistakes_of_files(folder: Path) -> None:
    wildcards = Wildcards(folder)
    with pytest.raises(ConfigError, match=r"no file for __wether__.*\n.*'weather'"):
        wildcards.expand("__wether__", 1)
    (folder / "round.txt").write_text("__back__\n", encoding="utf-8")
    (folder / "back.txt").write_text("__round__\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="__round__ -> __back__ -> __round__"):
        wildcards.expand("__round__", 1)
    (folder / "bad.txt").write_text("fine\n{a|b\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"bad\.txt:2: .*not closed"):
        wildcards.expand("__bad__", 1)
    (folder / "empty.txt").write_text("# nothing\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="no line"):
        wildcards.expand("__empty__", 1)
    for index in range(9):
        text = " ".join([f"__n{index + 1}__"] * 9)
        (folder / f"n{index}.txt").write_text(text, encoding="utf-8")
    (folder / "n9.txt").write_text("{|}", encoding="utf-8")
    with pytest.raises(ConfigError, match="more than"):
        wildcards.expand("__n0__", 1)


_words = st.text(st.sampled_from("ab ,.é"), max_size=6)
_TREES = st.recursive(
    _words.map(lambda text: (text, {text})),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(
            lambda options: (
                "{" + "|".join(text for text, _ in options) + "}",
                {result for _, found in options for result in found},
            )
        ),
        st.tuples(inner, inner).map(
            lambda pair: (pair[0][0] + pair[1][0], {a + b for a in pair[0][1] for b in pair[1][1]})
        ),
    ),
    max_leaves=8,
)


@settings(deadline=None)
@given(_TREES, st.integers(0, 2**63 - 1))
def test_a_template_becomes_one_of_what_it_describes(tree: tuple[str, set[str]], seed: int) -> None:
    template, possible = tree
    found = NO_FILES.expand(template, seed)
    assert found in possible
    assert NO_FILES.expand(template, seed) == found


@settings(deadline=None)
@given(st.text(), st.integers(0, 2**63 - 1))
def test_an_escaped_text_stays(text: str, seed: int) -> None:
    assert NO_FILES.expand(escape(text), seed) == text


@settings(deadline=None)
@given(st.text(st.sampled_from("{}|$:_-\\12ab ")), st.integers(0, 9))
def test_any_text_is_a_prompt_or_a_clear_error(text: str, seed: int) -> None:
    with suppress(ConfigError):  # anything else fails
        assert isinstance(NO_FILES.expand(text, seed), str)


def test_samples_have_words_and_template(folder: Path) -> None:
    variant = get_variant("wan2.1-t2v-1.3b")
    section = SamplingSection(
        wildcards=True, wildcards_folder=folder, seed=3, negative_prompt="{bad|worse}"
    )
    prompts = [Prompt(prompt="a {red|blue} cat"), Prompt(prompt="a cat", seed=3)]
    first, second = requests_of(prompts, variant, section)
    assert first.prompt in {"a red cat", "a blue cat"}
    assert first.prompt_template == "a {red|blue} cat"
    assert first.negative_prompt_template == "{bad|worse}"
    assert describe(first)["prompt_template"] == "a {red|blue} cat"
    assert second.prompt_template is None
    assert "prompt_template" not in describe(second)
    assert requests_of([Prompt(prompt="a {red|blue} cat", seed=3)], variant, section)[0] == first
    with pytest.raises(ConfigError, match=r"prompts\[1\]: .*not closed"):
        requests_of([prompts[1], Prompt(prompt="a {cat")], variant, section)


def test_braces_stay_as_long_as_nobody_asks() -> None:
    request = SampleRequest.of("a {red|blue} __cat__", get_variant("wan2.1-t2v-1.3b"))
    assert request.prompt == "a {red|blue} __cat__"
    assert request.prompt_template is None
