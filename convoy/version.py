"""The version of Convoy, for users and the programs that ask for it."""


def convoy_version() -> str:
    """Returns the installed version, or `unknown` where Convoy runs from a copy of the repository."""
    from importlib.metadata import PackageNotFoundError, version  # takes longer to import than most commands to start

    try:
        return version("convoy-vision")
    except PackageNotFoundError:
        return "unknown"
