"""Text that a terminal shows in one line, whatever is in the names of files."""


def printable(name: str) -> str:
    """Replaces unprintable characters: names of folders may hold line ends and undecodable bytes.

    The two joiners stay, without which Persian and Hindi words, and emoji, are written wrongly.
    """
    kept = "\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}"
    return "".join(one if one.isprintable() or one in kept else "\N{REPLACEMENT CHARACTER}" for one in name)
