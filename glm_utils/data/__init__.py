"""Data files: their forms, encodings and layouts -> examples and a report; without torch.

Entry points are in read.py. The folder belongs to the shared floor: every room may use it.
"""

from glm_utils.data.example import Example
from glm_utils.data.read import read_data, read_examples

__all__ = ["Example", "read_data", "read_examples"]
