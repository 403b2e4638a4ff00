"""A file that cannot be read is not called damaged, and the other way round."""

import errno
from pathlib import Path

import pytest

from trainer.errors import CheckpointError, ConfigError, reading, unknown_name

CONFIG = Path("run") / "config.json"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), "cannot read run/config.json: Permission denied"),
        (IsADirectoryError(errno.EISDIR, "Is a directory"), "cannot read run/config.json: Is a directory"),
        (OSError("a file system without error numbers"), "cannot read run/config.json: a file system without error"),
        (
            UnicodeEncodeError("utf-8", "caf\udce9", 3, 4, "surrogates not allowed"),
            "cannot read run/config.json: '",
        ),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "run/config.json is damaged: 'utf-8' codec"),
        (ValueError("no JSON"), "run/config.json is damaged: no JSON"),
        (KeyError("fingerprint"), "run/config.json is damaged: 'fingerprint'"),
        (RecursionError("maximum recursion depth exceeded"), "run/config.json is damaged: maximum"),  # of json
    ],
)
def test_an_unreadable_file_and_a_damaged_one_have_errors_of_their_own(error: Exception, message: str) -> None:
    with pytest.raises(CheckpointError) as raised, reading(CONFIG):
        raise error
    assert str(raised.value).startswith(message)


def test_other_errors_are_not_converted() -> None:
    with pytest.raises(ConfigError, match="no run"), reading(CONFIG):
        raise ConfigError("no run")


def test_an_unknown_name_is_one_short_line() -> None:
    """Forty names are no help."""
    many = [f"network{number}" for number in range(40)]
    assert str(unknown_name("recipe", "zebra", ["mnist", "cifar10"])) == "no recipe 'zebra': there are mnist, cifar10"
    close = str(unknown_name("recipe", "NETWRK7", many))
    assert close.startswith("no recipe 'NETWRK7': did you mean network7 or network")
    text = str(unknown_name("recipe", "zebra", many))
    assert text.startswith("no recipe 'zebra': of 40, the closest are network")
    assert text.count("network") == 3
    text = str(unknown_name("recipe", "zebra", many, listed_by="`convoy recipes`"))
    assert text == "no recipe 'zebra': `convoy recipes` lists all"
