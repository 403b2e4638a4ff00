"""Errors of sources of data sets. Each message is a reason that follows the name of the source."""

from trainer.errors import DataError


class SourceError(DataError):
    """A source cannot deliver the files."""


class MissingFilesError(SourceError):
    """Files are missing; those that the source has are good."""


class TooSlowError(SourceError):
    """The throughput is below the floor. `fetch_dataset` tries the source again when no other source has the files."""
