"""Shared parts of the scripts.

Importing it first silences messages of libraries that users cannot act on, and makes one line of a Ctrl-C that comes
before `run_cli` is there to handle it.
"""

import logging
import sys
import warnings


def _excepthook(kind, error, trace, print_other=sys.excepthook) -> None:
    """Print one line for Ctrl-C while a script imports its modules; anything else as before."""
    if issubclass(kind, KeyboardInterrupt):
        sys.stderr.write("interrupted by Ctrl-C\n")
    else:
        print_other(kind, error, trace)


sys.excepthook = _excepthook
# while importing, bitsandbytes asks for a package of CPU kernels for a layout that this project never uses
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# peft still reads the old name
warnings.filterwarnings("ignore", r"`is_gradient_checkpointing` is deprecated", FutureWarning)
