"""Where the grid of patches is known at each forward pass."""

from __future__ import annotations

__all__ = ["TokenGrid", "WindowGrid"]

from dataclasses import dataclass

from torch import Tensor, nn

from pl_normkit.methods.gaussian_bias.modules import Grid


class TokenGrid(nn.Module):
    """Stands behind the convolution that makes patches, hands its map on and remembers how many rows and columns it had.

    Grids are kept by their number of patches, so that a checkpointed layer that runs again finds the grid of its own pass.
    """

    def __init__(self, grid_size: Grid) -> None:
        super().__init__()
        self._grids: dict[int, Grid] = {grid_size[0] * grid_size[1]: grid_size}

    def forward(self, patches: Tensor) -> Tensor:
        """(N, C, rows, columns), unchanged."""
        grid = (int(patches.shape[-2]), int(patches.shape[-1]))
        if self._grids.get(grid[0] * grid[1]) != grid:
            self._grids[grid[0] * grid[1]] = grid
        return patches

    def grid_of(self, num_patches: int) -> Grid | None:
        return self._grids.get(num_patches)


@dataclass
class WindowGrid:
    """The window of an attention module, which `set_input_size` may change. The tuple keeps the module out of other modules' trees."""

    attention: tuple[nn.Module, ...]

    def grid_of(self, num_patches: int) -> Grid | None:
        rows, columns = self.attention[0].window_size  # type: ignore[misc]
        return (rows, columns) if rows * columns == num_patches else None
