from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kwaainet_bridge.hivemind.client import TextStream

TEXTS = [
    "Hello, world. It is a truth universally acknowledged",
    "naïve café , “quoted” — dash",
    "日本語テキスト 😀👨‍👩‍👧 end",
    "  two  spaces\n\tand a tab\n",
    "�",
    "",
]


@pytest.fixture(scope="module")
def byte_level() -> PreTrainedTokenizerFast:
    """Every token is one byte, as in the worst case of a byte-level BPE."""
    vocabulary = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=True)


@pytest.fixture(scope="module")
def sentence_piece() -> PreTrainedTokenizerFast:
    """As in Llama 2: words carry the space before them, the first one loses it, unknown bytes are tokens."""
    words = ["<s>", "</s>", "<unk>", "▁", "▁a", "▁b", "c", ".", "▁.", "▁n't", "▁ca"]
    words += [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={w: i for i, w in enumerate(words)}, merges=[], unk_token="<unk>", byte_fallback=True
        )
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=True
    )


def expected(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_make_the_text_and_hold_no_half_characters(byte_level, text: str) -> None:
    ids = byte_level(text)["input_ids"]
    stream = TextStream(byte_level)
    pieces = [stream.feed([i]) for i in ids]
    assert "".join(pieces) + stream.finish() == text
    if "�" not in text:
        assert not any("�" in piece for piece in pieces)
        assert stream.finish() == ""


def test_plain_letters_come_at_once(byte_level) -> None:
    stream = TextStream(byte_level)
    assert [stream.feed([i]) for i in byte_level("abc")["input_ids"]] == ["a", "b", "c"]


def test_several_tokens_at_a_time(byte_level) -> None:
    ids = byte_level("日本 語")["input_ids"]
    stream = TextStream(byte_level)
    assert stream.feed(ids[:7]) == "日本 "
    assert stream.feed(ids[7:]) == "語"


def test_half_a_character_at_the_end_is_shown_as_such(byte_level) -> None:
    ids = byte_level("a日")["input_ids"][:-1]
    stream = TextStream(byte_level)
    assert stream.feed(ids) == "a"
    assert stream.finish() == "�"
    assert stream.finish() == ""


def test_endless_garbage_is_not_held_back_for_ever(byte_level) -> None:
    broken = byte_level("😀")["input_ids"][:1] * 40
    stream = TextStream(byte_level)
    assert stream.feed(broken).count("�") >= 30


def test_the_first_space_depends_on_the_prompt(sentence_piece) -> None:
    a, b, c = sentence_piece.convert_tokens_to_ids(["▁a", "▁b", "c"])
    assert TextStream(sentence_piece).feed([a]) == "a"
    assert TextStream(sentence_piece, prompt=[b]).feed([a]) == " a"
    assert TextStream(sentence_piece, prompt=[b] * 100).feed([c]) == "c"
    stream = TextStream(sentence_piece, prompt=[sentence_piece.bos_token_id])
    assert [stream.feed([i]) for i in (a, b, c)] == ["a", " b", "c"]


def test_special_tokens_have_no_text(sentence_piece) -> None:
    a, b = sentence_piece.convert_tokens_to_ids(["▁a", "▁b"])
    stream = TextStream(sentence_piece, prompt=[a])
    assert stream.feed([b, sentence_piece.eos_token_id]) == " b"


def test_text_that_was_given_out_does_not_change(sentence_piece) -> None:
    """A tokenizer that cleans up would take back the space before a full stop."""
    ids = sentence_piece.convert_tokens_to_ids(["▁a", "▁.", "▁ca", "▁n't", "▁", "▁.", "c"])
    stream = TextStream(sentence_piece)
    assert "".join(stream.feed([i]) for i in ids) == expected(sentence_piece, ids)


def test_bytes_of_a_character_are_joined(sentence_piece) -> None:
    ids = sentence_piece.convert_tokens_to_ids(["▁a", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "▁b"])
    stream = TextStream(sentence_piece)
    assert [stream.feed([i]) for i in ids] == ["a", "", "", "", "😀", " b"]


def test_long_outputs_are_the_same_as_decoding_all(sentence_piece) -> None:
    words = ["▁a", "▁b", "c", ".", "<0xC3>", "<0xA9>", "▁", "▁."]
    ids = sentence_piece.convert_tokens_to_ids(words) * 20
    stream = TextStream(sentence_piece)
    assert stream.feed(ids) + stream.finish() == expected(sentence_piece, ids)
