"""Log lines of a stage as JSON objects: time, level, run, stage, rank (null: the driver), message."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator

from pythonjsonlogger.json import JsonFormatter

from repae_core.artifacts import Artifact, StoreError
from repae_core.artifacts.parting import at_the_end

_LOGGERS = [logging.getLogger(name) for name in ("repae", "repae_core")]


@contextlib.contextmanager
def stage_log(
    artifact: Artifact, name: str, *, run_id: str, rank: int | None = None, to_stderr: bool = False
) -> Iterator[None]:
    """What is logged inside also goes to `logs/<name>.log` of the artifact, when the block ends, however it ends.

    It follows what earlier attempts have left there.

    to_stderr: at once to this process's error output too, which Ray keeps with its own logs.
    """
    kept = io.StringIO()
    handlers: list[logging.Handler] = [logging.StreamHandler(kept)]
    if to_stderr:
        handlers.append(logging.StreamHandler())
    for handler in handlers:
        handler.setFormatter(line_format(run_id=run_id, stage=artifact.stage, rank=rank))
    for each in _LOGGERS:
        each.setLevel(logging.INFO)
        for handler in handlers:
            each.addHandler(handler)
    ended: BaseException | None = None
    try:
        yield
    except BaseException as error:
        ended, record = error, _ended_by(error)
        for handler in handlers:  # not for the terminal, which shows one line
            handler.handle(record)
        raise
    finally:
        for each in _LOGGERS:
            for handler in handlers:
                each.removeHandler(handler)
        with contextlib.suppress(StoreError):  # what ended the work is the news, not that its log is lost
            at_the_end(ended, lambda: _append(artifact, f"logs/{name}.log", kept.getvalue()))


def _append(artifact: Artifact, file: str, lines: str) -> None:
    earlier = b""
    with contextlib.suppress(FileNotFoundError):
        earlier = artifact.read_bytes(file)
    artifact.write_bytes(file, earlier + lines.encode())


def line_format(*, run_id: str, stage: str, rank: int | None) -> logging.Formatter:
    """One JSON object a line; a traceback is its field `exc_info`."""
    return JsonFormatter(
        ["timestamp", "levelname", "message"],
        timestamp=True,
        rename_fields={"levelname": "level", "timestamp": "time"},
        static_fields={"run": run_id, "stage": stage, "rank": rank},
    )


def _ended_by(error: BaseException) -> logging.LogRecord:
    caught = (type(error), error, error.__traceback__)
    return logging.LogRecord("repae", logging.ERROR, __file__, 0, "ended by %s", (type(error).__name__,), caught)
