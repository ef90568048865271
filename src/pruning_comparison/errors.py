"""What can go wrong, as one small tree. Each message says what is wrong, gives the value, and says what to do."""

from __future__ import annotations

from pathlib import Path


class PruningComparisonError(Exception):
    """Base of every error this package raises on purpose. Command-line exit code 1."""

    exit_code = 1


class InputError(PruningComparisonError, ValueError):
    """An option, file or combination that cannot work. Command-line exit code 2.

    ``option`` is the option that is to blame, such as "--variants", where it is known: the text then begins with it. It may
    be set anew where a command has another name for the same setting.
    """

    exit_code = 2

    def __init__(self, message: str, *, option: str | None = None) -> None:
        super().__init__(message)
        self.option = option

    def __str__(self) -> str:
        message = super().__str__()
        return f"{self.option}: {message}" if self.option else message


class ModelLoadError(InputError):
    """A model that cannot be loaded: unknown, unreachable, corrupt, unsafe or of an unsupported architecture."""


class MethodError(InputError):
    """A user's own pruning method that cannot be used: it raises, or returns what are no scores."""


class StoreError(PruningComparisonError):
    """A run folder that cannot be read or written."""


class HubError(PruningComparisonError):
    """The Hugging Face hub cannot be reached, or does not accept what is sent. What was to be sent stays where it is."""


class ClusterError(PruningComparisonError):
    """A cluster that cannot be joined, was lost, or would not measure the same. What was measured is kept."""


class Interrupted(PruningComparisonError):
    """The user stopped the run (Ctrl-C). Command-line exit code 130; the same command continues it in ``folder``."""

    exit_code = 130

    def __init__(self, message: str, folder: Path | None = None) -> None:
        super().__init__(message)
        self.folder = folder
