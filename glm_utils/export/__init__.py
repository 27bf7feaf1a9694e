"""The formats in which a merged model is written, each a module that keeps the `ExportFormat` protocol.

A new format is a module of this folder and a line in EXPORTS.
"""

from pathlib import Path
from typing import Any, Protocol

from glm_utils.export import chatglm, gguf_file, glm
from glm_utils.merging.merge import MergeJob


class ExportFormat(Protocol):
    """What a module of this folder has to offer.

    Attributes:
        LIBRARY_NAME: The library that loads the result, as the hub names it.
        USAGE: How the result is run, in Markdown; a part of its model card.
    """

    LIBRARY_NAME: str
    USAGE: str

    def check(self, job: MergeJob) -> int:
        """Check before any work that the merged model can be written in this format.

        Returns:
            Size of the directory, in bytes.

        Raises:
            UserError: It cannot, with the remedy.
        """

    def write(self, job: MergeJob, directory: Path) -> Any:
        """Write everything but the run's own records into an existing directory, config.json last.

        Returns:
            What `verify` compares with.
        """

    def verify(self, job: MergeJob, directory: Path, reference: Any) -> None:
        """Read the directory back.

        Raises:
            UserError: It differs from what was written.
        """


EXPORTS: dict[str, ExportFormat] = {"chatglm": chatglm, "glm": glm, "gguf": gguf_file}  # by --export_format
