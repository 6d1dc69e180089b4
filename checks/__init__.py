"""Tests of the parts, one file each; `python tests.py` runs them all.

Without a GPU the Triton kernels run in Triton's interpreter, chosen here: before it is imported."""
import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
