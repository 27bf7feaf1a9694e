"""The formats in which a merged model can be written, each a module that implements the `ExportFormat` protocol.

To add a format, add a module to this folder, a line to EXPORTS, and the name to the type of --export_format.
"""

from pathlib import Path
from typing import Any, Protocol

from glm_utils.export import chatglm, gguf_file, glm
from glm_utils.merging.merge import MergeJob


class ExportFormat(Protocol):
    """What a module of an export format provides.

    Attributes:
        LIBRARY_NAME: The hub's name of the library that loads the result, for the model card.
        USAGE: How to run the result, in Markdown, for the model card.
    """

    LIBRARY_NAME: str
    USAGE: str

    def check(self, job: MergeJob) -> int:
        """Check before any work that the merged model can be written in this format.

        Returns:
            Size of the directory, in bytes.

        Raises:
            UserError: The format does not support the model or the job's settings; the message says what to do.
        """
        ...

    def write(self, job: MergeJob, directory: Path) -> Any:
        """Write all files but run_config.json and the model card into an existing directory, config.json last.

        Returns:
            The reference for `verify`.
        """
        ...

    def verify(self, job: MergeJob, directory: Path, reference: Any) -> None:
        """Read the written files back and compare them with the reference that `write` returned.

        Raises:
            UserError: They differ.
        """
        ...


EXPORTS: dict[str, ExportFormat] = {"chatglm": chatglm, "glm": glm, "gguf": gguf_file}  # by --export_format
