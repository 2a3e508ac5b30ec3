"""umT5's tokenizer: exact ids from either file, cleaning, and tokenizers that are not umT5's."""

from __future__ import annotations

import io
import json

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from trainer.contract.errors import ModelFileError
from trainer.models.wan.tiny import tiny_tokenizer
from trainer.models.wan.tokenizer import (
    JsonTokenizer,
    SentencePieceTokenizer,
    clean_prompt,
    load_tokenizer,
    truncate,
)

SENTENCES = (
    "a red ball rolls to the left",
    "a blue square moves up slowly",
    "the green triangle falls down, then stops",
)
PROBES = (
    "a red ball",
    "",
    "   spaced\tout \n text  ",
    "unseen 龍 and émoji 🎬",
    "ＦＵＬＬ width",
    "x" * 50,
)


@pytest.fixture(scope="module")
def spiece() -> bytes:
    return tiny_tokenizer(SENTENCES)


@pytest.fixture(scope="module")
def ours(spiece) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(spiece, "test")


def hugging_face(spiece: bytes, unk_id: int = 3, byte_fallback: bool = True):
    """The same model as a tokenizer.json, as Google's conversion made it."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(spiece)
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    result = tokenizers.Tokenizer(models.Unigram(pieces, unk_id, byte_fallback))
    result.normalizer = normalizers.Sequence(
        [
            normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap),
            normalizers.Strip(left=True, right=True),
            normalizers.Replace(tokenizers.Regex(" {2,}"), "▁"),
        ]
    )
    result.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    result.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    result.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return result


@pytest.fixture(scope="module")
def json_file(spiece, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    hugging_face(spiece).save(str(path))
    return path


def test_training_is_reproducible(spiece):
    assert spiece == tiny_tokenizer(list(SENTENCES))
    assert spiece != tiny_tokenizer(SENTENCES[:2])


@pytest.mark.parametrize("prompt", PROBES)
def test_ids_are_sentencepieces(spiece, ours, prompt):
    library = sentencepiece.SentencePieceProcessor(model_proto=spiece)
    assert ours.encode(prompt) == [*library.encode(" ".join(prompt.split())), 1]


@pytest.mark.parametrize("prompt", PROBES)
def test_both_files_give_the_same_ids(ours, json_file, prompt):
    assert JsonTokenizer(json_file).encode(prompt) == ours.encode(prompt)


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("ab redlto,é龍🎬ｗ\u3000\n&;#39"), max_size=40))
def test_both_files_agree_on_any_text(ours, json_file, prompt):
    assert JsonTokenizer(json_file).encode(prompt) == ours.encode(prompt)


def test_unseen_characters_fall_back_to_bytes(spiece, ours):
    library = sentencepiece.SentencePieceProcessor(model_proto=spiece)
    ids = ours.encode("龍")
    assert [library.id_to_piece(i) for i in ids[-4:-1]] == ["<0xE9>", "<0xBE>", "<0x8D>"]


def test_without_byte_fallback_unseen_characters_are_unknown(spiece):
    proto = sentencepiece_model_pb2.ModelProto.FromString(spiece)
    kept = [p for p in proto.pieces if p.type != p.BYTE]
    del proto.pieces[:]
    proto.pieces.extend(kept)
    proto.trainer_spec.byte_fallback = False
    ids = SentencePieceTokenizer(proto.SerializeToString(), "test").encode("龍")
    assert ids[-2:] == [3, 1]


@pytest.mark.parametrize(
    ("dirty", "clean"),
    [
        ("  two   words\n", "two words"),
        ("l&#39;eau &amp;amp; co", "l'eau & co"),
        ("schÃ¶n", "schön"),
        ("“quoted”", '"quoted"'),
        ("\u3000wide\u00a0space", "wide space"),
    ],
)
def test_cleaning(dirty, clean):
    assert clean_prompt(dirty) == clean


def test_long_prompts_are_cut_before_the_end_mark():
    assert truncate(range(100, 200), 10) == [*range(100, 109), 199]
    assert truncate([5, 6, 1], 3) == [5, 6, 1]
    assert len(truncate([7] * 600)) == 512


def test_a_configured_truncation_in_the_file_is_not_obeyed(spiece, ours, tmp_path):
    limited = hugging_face(spiece)
    limited.enable_truncation(4)
    limited.enable_padding(length=16)
    limited.save(str(tmp_path / "tokenizer.json"))
    prompt = "a red ball rolls to the left"
    assert load_tokenizer(tmp_path).encode(prompt) == ours.encode(prompt)


def test_folder_prefers_the_original(spiece, json_file, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(json_file.read_bytes())
    assert isinstance(load_tokenizer(tmp_path), JsonTokenizer)
    (tmp_path / "spiece.model").write_bytes(spiece)
    assert isinstance(load_tokenizer(tmp_path), SentencePieceTokenizer)
    assert isinstance(load_tokenizer(tmp_path / "tokenizer.json"), JsonTokenizer)


def test_a_rewritten_tokenizer_json_is_refused(spiece, tmp_path):
    # transformers 5 rebuilds T5 tokenizers with unknown id 2 and no byte fallback.
    hugging_face(spiece, unk_id=2, byte_fallback=False).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelFileError, match="'<unk>': 2") as caught:
        load_tokenizer(tmp_path)
    assert "spiece.model" in caught.value.hint


def test_what_transformers_5_saves_is_refused(spiece, tmp_path):
    from transformers import T5Tokenizer

    (tmp_path / "spiece.model").write_bytes(spiece)
    T5Tokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "saved")
    content = json.loads((tmp_path / "saved/tokenizer.json").read_text())
    assert content["model"]["unk_id"] != 3, "transformers has mended it: drop the trap"
    with pytest.raises(ModelFileError, match="not umT5's tokenizer"):
        load_tokenizer(tmp_path / "saved")


def test_a_t5_tokenizer_is_refused(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=model,
        hard_vocab_limit=False,
        vocab_size=100,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (tmp_path / "spiece.model").write_bytes(model.getvalue())
    with pytest.raises(ModelFileError, match="not umT5's"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"\x00 not a model", b"\xff\xfe", b"", b"[]"])
@pytest.mark.parametrize("name", ["spiece.model", "tokenizer.json"])
def test_damaged_files_are_errors_for_people(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelFileError):
        load_tokenizer(tmp_path)


def test_nothing_there(tmp_path):
    with pytest.raises(ModelFileError, match=r"spiece\.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(ModelFileError, match="does not exist"):
        load_tokenizer(tmp_path / "gone.model")
