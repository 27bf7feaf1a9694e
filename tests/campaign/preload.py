"""Imported once by the process that campaigns fork commands from: the stages, their libraries and the model code."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import bitsandbytes  # noqa: F401
import peft  # noqa: F401
import torch

import chat_demo  # noqa: F401
import generate  # noqa: F401
import merge_lora_and_quantize  # noqa: F401
import train_qlora  # noqa: F401
from glm_utils.checkpoint import load_classes
from glm_utils.family import FAMILIES
from tools import to_glm  # noqa: F401

torch.set_num_threads(1)
for family in FAMILIES:
    load_classes(family)
