"""The log of every command: one format, one visible line for each message."""

import sys
from typing import TYPE_CHECKING

from loguru import logger
from tqdm import tqdm

from glm_utils.visible_text import one_line

if TYPE_CHECKING:
    import loguru

LOG_FORMAT = "<green>{time:HH:mm:ss}</green> <level>{level: <7}</level> {message}"


def setup_logging() -> None:
    """Write loguru's messages through tqdm, so that they do not break a progress bar.

    Whatever a message quotes (data, file names, settings, names of an adapter) is one line that cannot steer the
    terminal; the colors are the log's own and are added afterwards.
    """
    logger.remove()
    logger.configure(patcher=_spell_out)
    logger.add(
        lambda message: tqdm.write(message, file=sys.stderr, end=""),
        format=LOG_FORMAT,
        colorize=sys.stderr.isatty(),
        level="INFO",
    )


def _spell_out(record: "loguru.Record") -> None:
    """Make a log record's message one line of visible characters."""
    record["message"] = one_line(record["message"])
