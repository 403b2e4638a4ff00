"""The choice of a verb: help, unknown names, exit codes."""

import pytest

from convoy.verbs import Verb, run_verb

VERBS = {"train": Verb("train a model", lambda rest: None), "serve": Verb("serve models", lambda rest: len(rest))}


def test_the_verb_gets_the_rest_and_returns_the_exit_code() -> None:
    assert run_verb("convoy", VERBS, ["train"]) == 0
    assert run_verb("convoy", VERBS, ["serve", "--help", "b", "c"]) == 3


@pytest.mark.parametrize(("arguments", "code"), [([], 2), (["--help"], 0), (["-h"], 0)])
def test_help_has_one_line_for_each_verb(arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_verb("convoy", VERBS, arguments, more_help="\nmore") == code
    assert capsys.readouterr().out == (
        "usage: convoy VERB [OPTIONS]\n\n  train  train a model\n  serve  serve models\n\n"
        "convoy VERB --help shows its options.\nmore\n"
    )


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("trian", "error: no verb 'trian': did you mean train?\n"),
        ("search", "error: no verb 'search': there are train, serve\n"),
    ],
)
def test_an_unknown_verb_is_one_line_with_the_nearest(name: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_verb("convoy", VERBS, [name]) == 2
    assert capsys.readouterr() == ("", line)
