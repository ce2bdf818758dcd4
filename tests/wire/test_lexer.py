# SPDX-License-Identifier: LGPL-2.1-or-later
"""QEMU's JSON dialect: what is well-formed, what is wrong and in which words, and recovery."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secretd.wire import encoder, lexer
from secretd.wire.lexer import NEED_DATA, Streamer
from secretd.wire.parser import Fault, Number, Text


def outcomes(data: bytes, cuts: list[int] | None = None) -> list[str]:
    """All that the streamer finds, with the bytes arriving in pieces that end at ``cuts``."""
    streamer = Streamer()
    buffer = bytearray(len(data))
    view = memoryview(buffer)
    found = []
    position = fill = dropped = 0
    for cut in sorted({*(cuts or []), len(data)}):
        piece = data[dropped + fill : cut]
        view[fill : fill + len(piece)] = piece
        fill += len(piece)
        while True:
            position, outcome = streamer.next(view, position, fill)
            if outcome is NEED_DATA:
                break
            found.append(describe(outcome))
        kept = streamer.first_needed(position)
        view[: fill - kept] = bytes(view[kept:fill])
        view[fill - kept :] = bytes(len(view) - fill + kept)
        streamer.shifted(kept)
        fill, position, dropped = fill - kept, position - kept, dropped + kept
    return found


def describe(outcome: object) -> str:
    if not isinstance(outcome, Fault):
        return encoder.value(outcome)
    if outcome.quote is None:
        return outcome.before
    into = memoryview(bytearray(6 * len(outcome.quote)))
    quoted = bytes(into[: encoder.write_quoted(outcome.quote, into)]).decode()
    return outcome.before + json.loads(f'"{quoted}"') + outcome.after


ERROR = "JSON parse error, "
GOOD = [
    (b'{"a": [1, -2, 0, true, false, null, "x"]}', '{"a": [1, -2, 0, true, false, null, "x"]}'),
    (b"{'a': {}, 'b': [[], {'x': ['\"']}]}", '{"a": {}, "b": [[], {"x": ["\\""]}]}'),
    (
        b"[0.1,1.0,1e2,-0,-0.0,1E+2,2e-1]",
        "[0.10000000000000001, 1, 100, 0, -0, 100, 0.20000000000000001]",
    ),
    (
        b"[9223372036854775807,18446744073709551615,18446744073709551616,-9223372036854775808]",
        "[9223372036854775807, 18446744073709551615, 1.8446744073709552e+19, -9223372036854775808]",
    ),
    (b"[-9223372036854775809,1e400]", "[-9.2233720368547758e+18, inf]"),
    (b"[" + b"1" * 400 + b"]", "[inf]"),
    (
        rb'["\u00e9\ud83d\ude00\"\'\\\/\b\f\n\r\t"]',
        '["\\u00E9\\uD83D\\uDE00\\"\'\\\\/\\b\\f\\n\\r\\t"]',
    ),
    ('["é€😀\x7f"]'.encode(), '["\\u00E9\\u20AC\\uD83D\\uDE00\\u007F"]'),
    (b'["\\u0000\xc0\x80"]', '["\\u0000\\u0000"]'),
    (rb'["\uFDCF\uFDF0\uFFFD\ud83f\udffd"]', '["\\uFDCF\\uFDF0\\uFFFD\\uD83F\\uDFFD"]'),
    (b' \t\r\n{"a"\n:\r1\t} ', '{"a": 1}'),
    (b"[" * 1024 + b"]" * 1024, "[" * 1024 + "]" * 1024),
    (b'"text"', '"text"'),
    (b"17 ", "17"),
    (b"true\n", "true"),
]


@pytest.mark.parametrize(("data", "expected"), GOOD)
def test_well_formed_messages_are_read_whole_and_byte_by_byte(data: bytes, expected: str) -> None:
    """A message is the same however its bytes arrive."""
    assert outcomes(data) == [expected]
    assert outcomes(data, list(range(len(data)))) == [expected]


BAD = [
    (b'{"a": "abc\n', ["stray '\"abc\n'"]),
    (b'{"execute":"x","id":True}', ["stray 'T'", "expecting value"]),
    (b"01", ["stray '01'"]),
    ('"é\n'.encode(), ["stray '\"é\n'"]),
    (b"\xc3", ["stray '\ufffd'"]),
    (b'{"a":nope,"b":[1,2]}', ["invalid keyword 'nope'"]),
    (b"\xff\xff", ["stray '\ufffd'", "stray '\ufffd'"]),
    (b"{]", ["expecting value"]),
    (b"{,", []),
    (b"{,}", ["expecting value"]),
    (b"}", ["expecting value"]),
    (b",", ["expecting value"]),
    (b"[,]", ["expecting value"]),
    (b'{"a":}', ["expecting value"]),
    (b"tru\x01", ["invalid keyword 'tru'", "stray '\x01'"]),
    (b"-x", ["stray '-x'"]),
    (b"1.x", ["stray '1.x'"]),
    (b"1ex", ["stray '1ex'"]),
    (b"1e+x", ["stray '1e+x'"]),
    (b"'abc\xff", ["stray ''abc\ufffd'"]),
    (b"[1,2}", ["expected separator in list"]),
    (b'"a\x00b"', ["stray '\"a'"]),
    (b'{"a" "b"}', ["missing : in object pair"]),
    (b"{1:2}", ["key is not a string in object"]),
    (b"{[1]:2}", ["key is not a string in object"]),
    (b'{"a":1 "b":2}', ["expected separator in dict"]),
    (b"[1 2]", ["expected separator in list"]),
    (b'{"a":1,"\\u0061":2}', ["duplicate key"]),
    (b"%d ", ["stray '%'"]),
    (b"x" * 1100 + b" ", ["invalid keyword '" + "x" * 1006]),
    (b"x" * 1006 + b" ", ["invalid keyword '" + "x" * 1006]),
    (b"x" * 1005 + b" ", ["invalid keyword '" + "x" * 1005 + "'"]),
    (b"@\t1", ["stray '@'"]),
    (b"[0e]", ["expected separator in list"]),
    (b"[0E1]", ["stray 'E'", "expecting value"]),
    (b'"\xef\xbf\n', ["stray '\"\ufffd\n'"]),
    (b'"\xed\xa0\x80\xf8\x88\x80\x80\x80\n', ["stray '\"\ufffd\ufffd\n'"]),
    (b'"\xef\xbf\xbe\xef\xb7\x90\xf0\x9f\xbf\xbe\n', ["stray '\"\ufffd\ufffd\ufffd\n'"]),
    (rb'"\x41"', ["invalid escape sequence in string"]),
    (rb'"\u12"', ['\\u12" is not a valid Unicode character']),
    (rb'"\u12G4"', ["\\u12G4 is not a valid Unicode character"]),
    (rb'"\ud800x"', ["\\ud800 is not a valid Unicode character"]),
    (rb'"\ud800\u0041"', ["\\ud800 is not a valid Unicode character"]),
    (rb'"\udbff\udfff"', ["\\udbff\\udfff is not a valid Unicode character"]),
    (rb'"\uffff"', ["\\uffff is not a valid Unicode character"]),
    (rb'"\ufdd0"', ["\\ufdd0 is not a valid Unicode character"]),
    (b'"\xc3"', ["invalid UTF-8 sequence in string"]),
    (b'"\xed\xa0\x80"', ["invalid UTF-8 sequence in string"]),
    (b'"\xf4\x90\x80\x80"', ["invalid UTF-8 sequence in string"]),
    (b'"\xef\xbf\xbf"', ["invalid UTF-8 sequence in string"]),
    (b'"\xf0\x9f\xbf\xbe"', ["invalid UTF-8 sequence in string"]),
    (b'"\xc1\x81"', ["invalid UTF-8 sequence in string"]),
]


@pytest.mark.parametrize(("data", "expected"), BAD)
def test_malformed_messages_are_answered_as_qemu_does(data: bytes, expected: list[str]) -> None:
    """Each mess gets QEMU's errors, and the next message is read."""
    expected = [ERROR + words for words in expected]
    assert outcomes(data) == expected
    assert outcomes(data, list(range(len(data)))) == expected
    after = outcomes(data + b'\n\xff\n{"next": 1}')
    assert after[: len(expected)] == expected
    assert after[-1] == '{"next": 1}'


def test_nesting_too_deep_is_one_error_and_one_for_each_closer() -> None:
    """1025 brackets give 1026 replies, as in QEMU."""
    found = outcomes(b"[" * 1025 + b"]" * 1025)
    assert found == ["JSON nesting depth limit exceeded"] + [ERROR + "expecting value"] * 1025


@pytest.mark.slow
def test_a_message_of_too_many_tokens_is_refused() -> None:
    """The limit counts tokens, not bytes."""
    fits = b"[" + b"1," * ((lexer.MAX_TOKENS - 3) // 2) + b"1]"
    assert len(outcomes(fits)) == 1
    assert "limit" not in outcomes(fits)[0]
    found = outcomes(b"[" + b"1," * lexer.MAX_TOKENS)
    assert found[0] == "JSON token count limit exceeded"


@pytest.mark.parametrize("pieces", [1, 7])
def test_a_message_too_long_is_refused_and_the_next_one_read(pieces: int) -> None:
    """Strings and white space inside a message count alike."""
    limit = lexer.MAX_MESSAGE_BYTES
    long_string = b'{"a": "' + b"x" * limit + b'"}'
    cuts = [len(long_string) * i // pieces for i in range(1, pieces)]
    found = outcomes(long_string + b'\xff\n{"b":1}', cuts)
    assert found[0] == "JSON token size limit exceeded"
    assert found[-1] == '{"b": 1}'
    spaces = b'{"a":' + b" " * limit
    found = outcomes(spaces + b'\xff\n{"b":1}', [len(spaces)])
    assert found[0] == "JSON token size limit exceeded"
    assert found[-1] == '{"b": 1}'
    fits = b'["' + b"x" * (limit - 4) + b'"]'
    assert outcomes(fits, cuts) == [fits.decode()]


def test_text_and_numbers_have_no_telling_repr() -> None:
    """A secret in a parsed message does not show when the message is printed."""
    view = memoryview(b'"letmein"')
    assert repr(Text(view, 0, 9)) == "<Text of 7 bytes>"
    assert repr(Number(view, 0, 9, integer=True)) == "<Number>"


@pytest.mark.slow
@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cn"])), st.booleans())
def test_text_decodes_in_place_and_to_str_alike(text: str, single: bool) -> None:
    """Both ways of decoding undo what JSON escaping did."""
    encoded = bytearray(json.dumps(text, ensure_ascii=single).encode())
    content = text.encode().replace(b"\0", b"\xc0\x80")
    (outcome,) = [Streamer().next(memoryview(encoded), 0, len(encoded))[1]]
    assert isinstance(outcome, Text)
    assert outcome.to_str() == text
    assert bytes(outcome.decode_in_place()) == b'"' + content + b'"'


MESSY = st.lists(
    st.one_of(
        st.sampled_from(
            [
                b'{"execute":"x"}',
                b'"',
                b"'",
                b"\\",
                b"{",
                b"}",
                b"[",
                b"]",
                b",",
                b":",
                b"\n",
                b"\xff",
            ]
        ),
        st.sampled_from([b"\x01", b"tru", b"true", b"-1.5e3", b"0", b"\xc3\xa9", rb"\u00e9", b" "]),
        st.binary(max_size=3),
    ),
    max_size=30,
).map(b"".join)


@pytest.mark.slow
@given(MESSY, st.lists(st.integers(0, 90)))
def test_bytes_in_any_pieces_give_the_same_outcomes(data: bytes, cuts: list[int]) -> None:
    """State is kept exactly between feeds, and no mess makes the parser deaf."""
    assert outcomes(data) == outcomes(data, [cut for cut in cuts if cut < len(data)])
    assert outcomes(data + b'\n\xff\n{"next": 1}')[-1] == '{"next": 1}'


def test_strings_are_plain_python_only_where_asked() -> None:
    """Values stay offsets until they are asked for."""
    view = memoryview(b'{"a": ["b", 1, {"c": null}]}')
    _, message = Streamer().next(view, 0, len(view))
    assert isinstance(message, dict)
    assert isinstance(message["a"], list)
    assert isinstance(message["a"][0], Text)
