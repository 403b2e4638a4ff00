"""Convoy's extras: optional requirements, by their names in pyproject.toml."""


def how_to_install(extra: str) -> str:
    """Returns the command that installs an extra, for the end of an error's line; no index of packages has Convoy."""
    return f"pip install '.[{extra}]' in Convoy's folder"
