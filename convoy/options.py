"""Options of command lines that tyro reads: how the help shows them, and how a faulty command line is explained."""

import contextlib
import io
import itertools
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, get_args

import tyro


def option(metavar: str, default: str = "") -> Any:
    """Returns tyro's annotation of an option whose default value, such as None, would mean nothing to a user.

    Args:
        metavar: how the help shows the value, such as "PATH".
        default: the default in words; empty if the option is required.
    """
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})" if default else "(required)")


def check_port(name: str, port: int) -> None:
    """Checks that a port can exist; 0 stands for any that is free.

    Raises:
        ValueError: names the option and its valid values.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"{name} {port}: must be between 0 and 65535")


MAX_INTEGER = 2**63 - 1
"""The largest whole number that all libraries take."""

_MIN_COLUMNS = 40

_PLAINER = {
    r"invalid literal for int\(\) with base 10: ('.*?')": r"expected a whole number, got \1",
    r"could not convert string to float: ('.*?')": r"expected a number, got \1",
    r"no type matching (.+?) could be instantiated from \[(.*?)\]": r"expected \1, got \2",
    r"expected INT,": "expected a whole number,",
    r"expected FLOAT,": "expected a number,",
    r"[Mm]issing value for argument '(.*?)'\. Expected 1 values": r"\1 needs a value",
    r"(options:) ?(?=,|$)": r"\1 ''",  # an empty argument
}
"""How Convoy says what Python and tyro say of a wrong value."""


def parse_options(kind: Any, arguments: Sequence[str], *, prog: str, prints: bool = True, **settings: Any) -> Any:
    """Parses a command line. A faulty one ends the process with one line and exit code 2, `--help` with the help.

    Args:
        kind: a dataclass, or a union of subcommands.
        prints: False if another process of the same command prints help and errors.
        settings: further arguments of `tyro.cli`.

    Returns:
        An instance of `kind`.
    """
    explained = io.StringIO()
    try:
        with (
            contextlib.redirect_stdout(sys.stdout if prints else io.StringIO()),
            contextlib.redirect_stderr(explained),
            _least_width(),
        ):
            parsed = tyro.cli(kind, args=arguments, prog=prog, **settings)
    except SystemExit as left:
        if left.code and prints:
            print(explain_in_one_line(explained.getvalue(), prog, arguments), file=sys.stderr)
        raise
    for name, number in _numbers(parsed):
        if not -MAX_INTEGER - 1 <= number <= MAX_INTEGER:
            if prints:
                print(f"error: {name} {number}: must be a number of 64 bits, at most {MAX_INTEGER}", file=sys.stderr)
            sys.exit(2)
    return parsed


def _numbers(options: Any) -> Iterator[tuple[str, int]]:
    """Yields the whole numbers among options, with the names of the options."""
    for setting in fields(options) if is_dataclass(options) else ():
        value = getattr(options, setting.name)
        is_positional = tyro.conf.Positional in get_args(setting.type)
        name = setting.name if is_positional else f"--{setting.name.replace('_', '-')}"
        yield from ((name, one) for one in (value if isinstance(value, tuple) else (value,)) if isinstance(one, int))
        yield from _numbers(value)


@contextlib.contextmanager
def _least_width() -> Iterator[None]:
    """Context in which terminals have at least `_MIN_COLUMNS`: tyro never ends to break lines for narrower ones."""
    given = os.environ.get("COLUMNS")
    columns = shutil.get_terminal_size().columns
    try:
        if columns < _MIN_COLUMNS:
            os.environ["COLUMNS"] = str(_MIN_COLUMNS)
        yield
    finally:
        if columns < _MIN_COLUMNS:
            os.environ.pop("COLUMNS")
            os.environ.update({} if given is None else {"COLUMNS": given})


def explain_in_one_line(printed: str, prog: str, arguments: Sequence[str]) -> str:
    """Returns tyro's explanation of a faulty command line, several lines in a box or between rules, as one line.

    Args:
        printed: what tyro printed.
        prog: the command, whose `--help` lists its options.
        arguments: the command line.
    """
    plain = re.sub(r"\x1b\[[0-9;]*m", "", printed)
    lines = [line[2:].rstrip("│ ") for line in plain.splitlines() if not line.startswith(("╭", "╰"))]
    parts = [list(part) for is_rule, part in itertools.groupby(lines, _is_rule) if not is_rule]
    if "╭" not in plain:  # standard output is not UTF-8: the title is above the first rule, not in a border
        parts = parts[1:]
    problem = _missing(parts) or " ".join(itertools.takewhile(bool, parts[0] if parts else []))
    problem = problem or "the command line is faulty"
    for word in (word for word in arguments if len(word) > 20):  # tyro cuts long ones to fit into its box
        problem = re.sub(" ?".join(map(re.escape, word)), word.replace("\\", r"\\"), problem)
    for noise in ("Error parsing ", "'None', ", "{None}|", " (required)"):
        problem = problem.replace(noise, "")
    for pattern, plainer in _PLAINER.items():
        problem = re.sub(pattern, plainer, problem)
    near = [entry for part in parts if part[0].startswith("Perhaps") for entry in _entries(part)]
    names = [entry.split()[0].rstrip(",") for entry in near]
    hint = f"did you mean {' or '.join(dict.fromkeys(names))}?" if names else f"see {prog} --help"
    if not problem[:2].isupper():  # else it begins with the name of an argument
        problem = problem[0].lower() + problem[1:]
    return f"error: {problem.removesuffix('.')}: {hint}"


def _missing(parts: Sequence[Sequence[str]]) -> str:
    """Returns which required options are missing, and which given ones are unknown; "" if none is missing."""
    if not parts or not parts[0][0].startswith("Missing from "):
        return ""
    unknown = [word for part in parts if part[0].startswith("Unrecognized options") for word in _entries(part)]
    missing = f"missing {' and '.join(_entries(parts[0]))}"
    return f"{missing}, and unrecognized {' '.join(unknown)}" if unknown else missing


def _entries(part: Sequence[str]) -> list[str]:
    """Returns the lines of a list that tyro printed, without the lines of help below each, which are indented more."""
    return [line.strip() for line in part if re.match(r" {4}\S", line)]


def _is_rule(line: str) -> bool:
    return len(line) > 2 and set(line) in ({"─"}, {"-"})
