"""The suite. What must be set before a test module, or the fixtures, import Triton is set here: torch.export imports it too."""

import os

import torch

if not torch.cuda.is_available():
    # Triton asks once, at its first import, whether kernels run in its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")
