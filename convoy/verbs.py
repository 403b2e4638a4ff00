"""Commands that consist of verbs: prints their help and runs the verb that the user names.

Imports nothing that takes time, so that help is instant.
"""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Verb:
    """One verb of a command.

    Args:
        summary: one line for the command's help.
        run: gets the rest of the command line; returns the exit code, or ends the process itself.
    """

    summary: str
    run: Callable[[Sequence[str]], int | None]


def run_verb(
    prog: str, verbs: Mapping[str, Verb], arguments: Sequence[str], *, kind: str = "verb", more_help: str = ""
) -> int:
    """Runs the verb that the arguments name, or prints the help.

    Args:
        prog: the command, such as "python -m trainer".
        kind: what the help calls a verb.
        more_help: appended to the help.

    Returns:
        The verb's exit code; 0 after `--help`; 2 where the verb is missing or unknown.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage(prog, verbs, kind) + more_help)
        return 0 if arguments else 2
    name, rest = arguments[0], arguments[1:]
    if name not in verbs:
        print(f"error: no {kind} {name!r}: {_nearest(name, verbs)}", file=sys.stderr)
        return 2
    return verbs[name].run(rest) or 0


def _usage(prog: str, verbs: Mapping[str, Verb], kind: str) -> str:
    width = max(map(len, verbs))
    lines = (f"  {name:{width}s}  {verb.summary}" for name, verb in verbs.items())
    command = f"{prog} {kind.upper()}"
    return "\n".join([f"usage: {command} [OPTIONS]", "", *lines, "", f"{command} --help shows its options."])


def _nearest(name: str, known: Iterable[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
