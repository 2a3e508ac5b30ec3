"""What becomes of captions: dropout, prefix, triggers, tags in other orders, several a clip."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from data_clips import write_caption, write_video
from data_fakes import FakeTextEncoder, Models, dataset_of
from hypothesis import given
from hypothesis import strategies as st

from trainer.contract.caption_options import CaptionOptions
from trainer.contract.dataset_config import SourceOptions, parse_dataset
from trainer.contract.errors import ConfigError, DataError
from trainer.data.captions import caption_texts, read_captions
from trainer.data.items import load_cached_dataset
from trainer.data.loader import load_batch
from trainer.data.order import BatchOrder
from trainer.data.sources import scan_source


def texts(caption, **options):
    return caption_texts((caption,), CaptionOptions(**options))


def test_captions_stay_as_they_are_without_options():
    assert texts("a cat, sitting, a cat\nby the sea") == ("a cat, sitting, a cat\nby the sea",)


def test_prefix_suffix_and_triggers_in_their_order():
    options = {"caption_prefix": "[", "caption_suffix": "]", "trigger_words": ["ohwx", "style"]}
    assert texts("a cat", **options) == ("[ohwx, style, a cat]",)
    assert texts("An OHWX cat", **options) == ("[style, An OHWX cat]",)
    assert texts("lifestyle, ohwx", **options) == ("[style, lifestyle, ohwx]",)
    assert texts("a cat", trigger_words="sks dog") == ("sks dog, a cat",)


def test_each_line_is_a_caption():
    assert texts("one\n\n two \none\n", caption_lines=True) == ("one", "two")


tags = st.lists(st.text("abcdef", min_size=1, max_size=4), min_size=1, max_size=8)


@given(tags, st.integers(0, 9), st.integers(2, 12))
def test_shuffled_tags_are_the_same_tags_and_the_first_stay(words, kept, variants):
    options = {"shuffle_tags": True, "keep_tags": kept, "caption_variants": variants}
    orders = texts(", ".join(words), **options)
    assert orders[0] == ", ".join(words)
    assert 1 <= len(orders) <= variants
    assert len(set(orders)) == len(orders)
    for order in orders:
        assert Counter(order.split(", ")) == Counter(words)
        assert order.split(", ")[:kept] == words[:kept]
    assert orders == texts(", ".join(words), **options)


def test_as_many_orders_as_asked_for_where_there_are():
    caption = "a; b; c; d; e"
    shuffled = texts(caption, shuffle_tags=True, tag_separator=";", caption_variants=20)
    assert len(shuffled) == 20
    assert len(texts("a, b", shuffle_tags=True, caption_variants=20)) == 2
    assert texts(caption, shuffle_tags=True) == (caption,), "no commas, no tags"


def test_json_captions(tmp_path):
    media, file = tmp_path / "a.mp4", tmp_path / "a.json"
    file.write_text('["one", " two "]')
    assert read_captions(media, ".json") == ("one", "two")
    file.write_text('"one"')
    assert read_captions(media, ".json") == ("one",)
    for wrong in ("[1]", "{}", "[", '["\\ud800"]', "[" * 9999):
        file.write_text(wrong)
        with pytest.raises(DataError, match="no JSON string or list"):
            read_captions(media, ".json")
    file.write_text("[]")
    with pytest.raises(DataError, match="empty"):
        read_captions(media, ".json")


def test_lists_of_captions_in_jsonl(tmp_path):
    (tmp_path / "a.mp4").touch()
    file = tmp_path / "list.jsonl"
    file.write_text(json.dumps({"video_path": "a.mp4", "caption": ["one", "", "two"]}))
    source = SourceOptions(
        video_jsonl_file=file, cache_directory=tmp_path / "cache", caption_prefix="> "
    )
    (item,) = scan_source(source).items
    assert item.captions == ("> one", "> two")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("caption_dropout", 1.5),
        ("caption_variants", 1),
        ("tag_separator", ""),
        ("trigger_words", [""]),
        ("keep_tags", -1),
    ],
)
def test_values_that_make_no_sense_are_refused(key, value):
    with pytest.raises(ConfigError) as caught:
        parse_dataset({"general": {key: value}, "datasets": [{"video_directory": "x"}]})
    assert caught.value.problems[0].key.startswith(f"general.{key}")


@pytest.mark.parametrize(
    "key", ["is_reg", "caption_dropout_rate", "shuffle_caption", "keep_tokens"]
)
def test_keys_of_other_trainers_name_ours(key):
    with pytest.raises(ConfigError, match="a key of other trainers: "):
        parse_dataset({"datasets": [{"video_directory": "x", key: 1}]})


# From the cache to the batch --------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two clips; tests write captions of their own beside them."""
    path = tmp_path_factory.mktemp("captioned")
    for name in "ab":
        write_video(path / f"{name}.mp4", 6)
    return path


def drawn(folder, epochs, **keys):
    """Cache the folder and return the words of each clip's caption over so many epochs."""
    dataset, models = dataset_of(folder, batch_size=2, **keys), Models()
    models.cache(dataset)
    order = BatchOrder(load_cached_dataset(dataset, models.settings()).items, seed=3)
    seen: dict[str, list[list[float]]] = {}
    for position in range(epochs * order.batches_per_epoch):
        draws = order.batch(position)
        for draw, context in zip(draws, load_batch(draws).context, strict=True):
            seen.setdefault(draw.item.name.rpartition("/")[2][0], []).append(context[:, 0].tolist())
    return seen, models.text.captions


def test_every_caption_is_encoded_and_has_its_turn(folder):
    write_caption(folder / "a.mp4", "1\n22\n333")
    write_caption(folder / "b.mp4", "4444")
    seen, encoded = drawn(folder, 9, caption_lines=True)
    assert set(encoded) - {""} == {"1", "22", "333", "4444"}
    for start in (0, 3, 6):
        assert sorted(seen["a"][start : start + 3]) == [[1.0], [2.0], [3.0]]
    assert seen["b"] == [[4.0]] * 9
    cycles = {tuple(map(tuple, seen["a"][start : start + 3])) for start in (0, 3, 6)}
    assert len(cycles) > 1, "the order is drawn anew"


def test_shuffled_tags_reach_the_batch(folder):
    write_caption(folder / "a.mp4", "k, aa, bbb, cccc")
    write_caption(folder / "b.mp4", "one")
    seen, encoded = drawn(folder, 6, shuffle_tags=True, keep_tags=1, caption_variants=6)
    assert len(set(encoded) - {""}) == 6 + 1
    assert len(set(map(tuple, seen["a"]))) == 6
    assert all(order[0] == len("k,") for order in seen["a"])


def test_dropout_gives_the_empty_caption_as_often_as_asked(folder):
    for name in "ab":
        write_caption(folder / f"{name}.mp4", "word")
    empty = FakeTextEncoder.context("")[:, 0].tolist()
    seen, _ = drawn(folder, 300, caption_dropout=0.2)
    share = sum(words == empty for words in seen["a"] + seen["b"]) / 600
    assert 0.14 < share < 0.26
    assert seen["a"] != seen["b"], "each item on its own"
    assert drawn(folder, 300, caption_dropout=0.2)[0] == seen, "the same in every run"
    assert all(words == empty for words in drawn(folder, 3, caption_dropout=1)[0]["a"])


def test_a_changed_caption_option_is_noticed(folder):
    write_caption(folder / "a.mp4", "x, y")
    write_caption(folder / "b.mp4", "x")
    models = Models()
    models.cache(dataset_of(folder))
    for keys in ({"caption_suffix": "!"}, {"trigger_words": ["t"]}, {"shuffle_tags": True}):
        with pytest.raises(DataError, match="its caption has changed"):
            load_cached_dataset(dataset_of(folder, **keys), models.settings())
    load_cached_dataset(dataset_of(folder, caption_dropout=0.5), models.settings())
