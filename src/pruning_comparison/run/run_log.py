"""What is logged while a run goes on, kept in ``run.log`` of its folder: with times, and with the tracebacks of failures."""

from __future__ import annotations

import logging
from contextlib import suppress
from logging.handlers import MemoryHandler
from pathlib import Path
from types import TracebackType

RUN_LOG = "run.log"
LOGGER = logging.getLogger(__name__)
_PACKAGE = logging.getLogger("pruning_comparison")
_MOST_BEFORE_THE_FOLDER = 10_000


class RunLog:
    """Within it, the package logs from INFO on, and all of that goes to ``run.log`` once ``kept_in`` has named the folder.

    What is logged before waits until then. A log that cannot be written, on a full disk say, stops nothing: what is measured
    is in the journal.
    """

    def __init__(self) -> None:
        self._early = MemoryHandler(_MOST_BEFORE_THE_FOLDER, flushLevel=logging.CRITICAL + 1, flushOnClose=False)
        self._file: _LogFile | None = None
        self._level = logging.NOTSET

    def __enter__(self) -> RunLog:
        self._level = _PACKAGE.level
        if _PACKAGE.getEffectiveLevel() > logging.INFO:
            _PACKAGE.setLevel(logging.INFO)
        _PACKAGE.addHandler(self._early)
        return self

    def kept_in(self, folder: Path) -> Path:
        """The folder, in which the log is kept from now on; what was logged before is entered."""
        try:
            self._file = _LogFile(folder / RUN_LOG, encoding="utf-8", errors="replace")
        except OSError:
            return folder
        self._file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._early.setTarget(self._file)
        self._early.flush()
        _PACKAGE.removeHandler(self._early)
        _PACKAGE.addHandler(self._file)
        return folder

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _PACKAGE.removeHandler(self._early)
        self._early.close()
        if self._file is not None:
            if isinstance(error, Exception):
                # Whoever catches it says so; here it is only kept, with the place where it arose.
                record = _record(f"stopped: {error}")
                record.exc_info = (type(error), error, traceback)
                self._file.handle(record)
            _PACKAGE.removeHandler(self._file)
            with suppress(OSError):
                self._file.close()
        _PACKAGE.setLevel(self._level)


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """A line that cannot be written is left out."""


def log_failure(what: str, reason: str | None, traceback: str = "") -> None:
    """Logs that something could not be measured. ``traceback`` is text, as it comes from other processes as well.

    Handlers show it below the message, as they show that of an exception.
    """
    record = _record(f"failed: {what}: {reason}")
    record.exc_text = traceback or None
    if LOGGER.isEnabledFor(record.levelno):
        LOGGER.handle(record)


def _record(message: str) -> logging.LogRecord:
    return LOGGER.makeRecord(LOGGER.name, logging.ERROR, __file__, 0, message, (), None)
