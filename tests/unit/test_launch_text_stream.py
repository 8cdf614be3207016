"""Text while it comes: whole characters, no part of a stop string, the same text whatever the pieces."""

import random

import pytest

from data.tokenizer import ByteTokenizer, train_bpe
from launch.text_stream import TextStream

TEXT = "def größe(x):  # 日本語 🎉\n    return x\n\nEND. Next"


def tokenizers():
    yield ByteTokenizer()
    pytest.importorskip("tokenizers")
    yield train_bpe([TEXT * 3, "größe 日本 return"], 300)


class Words:
    """A vocabulary whose text is not the sum of its tokens': a space before each word but the first, as in
    SentencePiece, and a character in two halves that shows as a replacement until both are there."""

    words = ("one", "two", "END", "half\x01", "half\x02")

    def decode_bytes(self, ids):
        text = " ".join(self.words[token] for token in ids)
        return text.replace("half\x01 half\x02", "é").replace("half\x01", "\N{REPLACEMENT CHARACTER}").encode()


def pieces_of(stream, tokens, sizes):
    made = []
    while tokens and not stream.stopped:
        size = next(sizes)
        made.append(stream.push(tokens[:size]))
        tokens = tokens[size:]
    return [*made, stream.finish()]


@pytest.mark.parametrize("seed", range(4))
def test_pieces_are_whole_characters_and_add_up(seed):
    draw = random.Random(seed)
    for tokenizer in tokenizers():
        ids = tokenizer.encode(TEXT).tolist()
        for sizes in (iter(lambda: 1, 0), iter(lambda: draw.randint(1, 5), 0)):
            stream = TextStream(tokenizer.decode_bytes, before=tokenizer.encode("abc").tolist())
            made = pieces_of(stream, ids, sizes)
            assert "".join(made) == TEXT and "\N{REPLACEMENT CHARACTER}" not in "".join(made)


@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        (["END."], TEXT[: TEXT.index("END.")]),
        (["Nexus", "\n\nEND"], TEXT[: TEXT.index("\n\nEND")]),
        (["🎉"], TEXT[: TEXT.index("🎉")]),
        (["rn x\n\nEN", "END"], TEXT[: TEXT.index("rn x\n\nEN")]),
        (["Nextt", "absent"], TEXT),
        (["d"], ""),
    ],
)
def test_nothing_of_a_stop_string_appears(stops, expected):
    for tokenizer in tokenizers():
        stream = TextStream(tokenizer.decode_bytes, stops)
        shown = ""
        for piece in pieces_of(stream, tokenizer.encode(TEXT).tolist(), iter(lambda: 1, 0)):
            shown += piece
            assert expected.startswith(shown)
        assert shown == expected and stream.stopped == (expected != TEXT)
        if stream.stopped:
            assert stream.push(tokenizer.encode("more").tolist()) == stream.finish() == ""


def test_text_appears_as_soon_as_it_is_safe():
    stream = TextStream(ByteTokenizer().decode_bytes, ["abcd"])
    assert [stream.push([byte]) for byte in b"xababx"] == ["x", "", "", "ab", "", "abx"]


def test_broken_utf8_is_replaced_once_it_is_known_to_be_broken():
    stream = TextStream(ByteTokenizer().decode_bytes)
    assert [stream.push([0xE6]), stream.push([0x41])] == ["", "\N{REPLACEMENT CHARACTER}A"]
    assert [stream.push([0xE6, 0x97]), stream.finish()] == ["", "\N{REPLACEMENT CHARACTER}"]


def test_a_vocabulary_whose_text_depends_on_the_tokens_before():
    stream = TextStream(Words().decode_bytes, ["END"], before=[0])
    made = [stream.push([token]) for token in (1, 3, 4, 0)]
    assert made == [" two", "", " é", " one"]
    assert [stream.push([2]), stream.stopped] == [" ", True]
