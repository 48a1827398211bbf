"""What makes a model with its inputs."""

from __future__ import annotations

from typing import Any

from torch import nn

Made = tuple[nn.Module, Any]
