"""Why a source cannot give a data set; each message is the reason, for the line that names the source."""

from trainer.errors import DataError


class SourceError(DataError):
    """A source cannot give the files."""


class MissingFilesError(SourceError):
    """Files are missing, and those that are there are good."""


class TooSlowError(SourceError):
    """The source delivers, but below the floor on throughput: worth another try when no other source has the files."""
