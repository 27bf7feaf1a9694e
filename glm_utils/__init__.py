"""Shared parts of the scripts. Importing it first silences messages of libraries that users cannot act on."""

import logging
import warnings

# while importing, bitsandbytes asks for a package of CPU kernels for a layout that this project never uses
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# peft still reads the old name
warnings.filterwarnings("ignore", r"`is_gradient_checkpointing` is deprecated", FutureWarning)
