"""The format of token files."""

import pytest

from convoy.token_lines import TokenLine, parse_token_lines

SCOPES = frozenset({"infer", "admin", "metrics"})
INFER = frozenset({"infer"})


@pytest.mark.parametrize(
    "content", [b"s3cret", b"s3cret\n", b" s3cret \r\n", b"\xef\xbb\xbfs3cret\r\n\r\n", b"\n# x\ns3cret"]
)
def test_a_token_alone(content: bytes) -> None:
    assert parse_token_lines(content, SCOPES) == [TokenLine("s3cret", "default", None)]


@pytest.mark.parametrize("token", ["abc==", "a#b", "a=b", "~!", "x" * 4096])
def test_a_token_may_hold_any_printable_ascii(token: str) -> None:
    [line] = parse_token_lines(token.encode(), SCOPES)
    assert line.token == token
    assert token not in repr(line)


def test_several_tokens_with_options_and_comments() -> None:
    content = b"""
        # rotated on 1 May, by J\xf6rg
        one name=alice  scopes=infer,admin
        two name=batch scopes=infer requests_per_second=0.5 bytes_per_second=10Mi
        new bytes_per_second=10Mi requests_per_second=0.5 scopes=metrics name=batch
    """
    assert parse_token_lines(content, SCOPES) == [
        TokenLine("one", "alice", frozenset({"infer", "admin"})),
        TokenLine("two", "batch", INFER, (0.5, 10 * 2**20)),
        TokenLine("new", "batch", frozenset({"metrics"}), (0.5, 10 * 2**20)),
    ]


@pytest.mark.parametrize(
    ("text", "rate"),
    [("1", 1), ("64k", 64e3), ("64Ki", 65536), ("10M", 10e6), ("2.5G", 2.5e9), ("1Gi", 2**30), ("0.01", 0.01)],
)
def test_numbers(text: str, rate: float) -> None:
    [line] = parse_token_lines(f"x name=a scopes=infer bytes_per_second={text}".encode(), SCOPES)
    assert line.rates == (None, rate)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "it is empty"),
        ("# s3cret\n", "it is empty"),
        ("s3cret another", "line 1: after the token, expected name=…"),
        ("name=a s3cret scopes=infer", "line 1: expected a token of printable ASCII characters first"),
        ("s3crét", "line 1: expected a token of printable ASCII characters first"),
        ("s3\x00cret", "line 1: expected a token"),
        ("ok\ns3cret nam=a scopes=infer", "line 2: after the token, expected name=…"),
        ("s3cret name=a name=b scopes=infer", "line 1: after the token, .* each once"),
        ("s3cret name=a", "line 1: a token that is followed by anything needs name=… and scopes=…"),
        ("s3cret scopes=infer", "line 1: a token that is followed by anything needs"),
        ("s3cret name= scopes=infer", "line 1: name= must be followed by 1 to 64 letters"),
        ("s3cret name=a\x1bb scopes=infer", "line 1: name= must be followed by"),
        ("s3cret name=a scopes=", "line 1: scopes= must be followed by some of admin,infer,metrics"),
        ("s3cret name=a scopes=infer,root", "line 1: scopes= must be"),
        ("s3cret name=a scopes=infer,", "line 1: scopes= must be"),
        ("s3cret name=a scopes=infer requests_per_second=0", "line 1: quotas must be positive numbers"),
        ("s3cret name=a scopes=infer requests_per_second=-1", "line 1: quotas must be"),
        ("s3cret name=a scopes=infer bytes_per_second=10MB", "line 1: quotas must be"),
        ("s3cret name=a scopes=infer bytes_per_second=inf", "line 1: quotas must be"),
        ("s3cret name=a scopes=infer\ns3cret name=b scopes=infer", "line 2: this token is in an earlier line already"),
        (
            "x name=a scopes=infer requests_per_second=1\ns3cret name=a scopes=infer",
            "line 2: all lines of one name must have the same quotas",
        ),
    ],
)
def test_what_is_wrong_is_said_without_quoting_a_token(content: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as caught:
        parse_token_lines(content.encode(), SCOPES)
    assert "s3" not in str(caught.value)
