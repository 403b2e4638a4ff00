"""Options of command lines that tyro reads: how the help shows an option's value and default."""

from typing import Any

import tyro


def option(metavar: str, default: str = "") -> Any:
    """Returns tyro's annotation of an option whose default value, such as None, would mean nothing to a user.

    Args:
        metavar: how the help shows the value, such as "PATH".
        default: the default in words; empty if the option is required.
    """
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})" if default else "(required)")
