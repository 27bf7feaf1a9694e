"""transformers' bar "Loading weights": only where somebody watches it, and only for loads that take a while."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging

from glm_utils.checkpoint import Checkpoint
from glm_utils.model_files.checkpoint_files import weight_files

MIN_BYTES = 2_000_000_000  # of weights: below, a bar is gone within a few seconds


@contextmanager
def bar_of_long_loads(checkpoint: Checkpoint) -> Iterator[None]:
    """Switch the bar off while a small model is loaded, or while stderr is no terminal; other bars are not touched."""
    num_bytes = sum(path.stat().st_size for path in weight_files(checkpoint.directory))
    was_on = logging.is_progress_bar_enabled()
    if not was_on or (sys.stderr.isatty() and num_bytes >= MIN_BYTES):
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
