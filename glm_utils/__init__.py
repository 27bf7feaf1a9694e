"""Shared parts of the scripts.

Importing it first silences messages of libraries that users cannot act on, and makes one line of a Ctrl-C that comes
while a script still imports its modules.
"""

import logging
import warnings

from glm_utils.signals import quiet_interruptions

quiet_interruptions()
# while importing, bitsandbytes asks for a package of CPU kernels for a layout that this project never uses
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# peft still reads the old name
warnings.filterwarnings("ignore", r"`is_gradient_checkpointing` is deprecated", FutureWarning)
