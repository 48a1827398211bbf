"""`line_s`: how far a fine-tuned checkpoint is from its origin, scaled by depth."""

from __future__ import annotations

__all__ = ["line_s"]

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from torch import Tensor

from pl_normkit.errors import ConfigError, DataError

_NUMBER = re.compile(r"^(.*?)(\d+)$")


def line_s(
    pretrained: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    *,
    alpha: float,
    beta: float | None = None,
    blocks: str | Sequence[str] | None = None,
    after: float | None = None,
    keep: Sequence[str] = (),
) -> dict[str, Tensor]:
    """LiNeS: a state_dict between two checkpoints, near the old one in the first block and near, or at, the new one in the last.

    theta = theta_0 + (alpha + beta (l - 1) / (L - 1)) (theta_1 - theta_0) in block l of L, theta_0 + alpha (theta_1 - theta_0) outside of
    blocks. It keeps more of what the old model could; choose `alpha` on validation data of both tasks. `alpha=1, beta=0` gives the new
    checkpoint, `alpha=0, beta=0` the old one. Running statistics of batch norms are mixed as well: measure them anew
    (`recalibrate_batch_norm`).

    Args:
        pretrained: state_dict of the old checkpoint.
        tuned: that of the new one, with the same keys and shapes but for `keep`; neither is changed.
        alpha: factor of the first block and of what stands outside of blocks.
        beta: what the last block has more; None takes 1 - alpha, one task's default.
        blocks: the path before the blocks' numbers (`"vit.encoder.layer"`), or the paths of the blocks in order (`["layer1.0", ...]`);
            None takes the only numbered row of modules with the same keys in each block.
        after: factor of what comes after the last block in `tuned`, such as the final norm; None takes alpha, as the published code does.
        keep: paths whose entries are taken from `tuned` as they are, such as a new head.

    Returns: a new state_dict with the keys of `tuned`. What holds no numbers with a fraction is taken from `tuned`.

    Raises:
        ConfigError: for blocks that are not there or cannot be told, and for a path of `keep` without entries.
        DataError: for keys that only one checkpoint has, and for other shapes.

    Source: "LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model Merging", arXiv 2410.17146, its formula and code.
    `after` is derived here: the last layers get the smallest factor without it. Merging of several tasks is not here.

    >>> import torch
    >>> old = {"stem": torch.zeros(1), "blocks.0.w": torch.zeros(1), "blocks.1.w": torch.zeros(1), "blocks.2.w": torch.zeros(1)}
    >>> new = {name: torch.ones(1) for name in old}
    >>> [round(value.item(), 2) for value in line_s(old, new, alpha=0.1).values()]
    [0.1, 0.1, 0.55, 1.0]
    """
    beta = 1 - alpha if beta is None else beta
    _check_keys(pretrained, tuned, keep)
    paths = _block_paths(tuned, blocks)
    steps = max(len(paths) - 1, 1)
    number = {name: depth for depth, path in enumerate(paths) for name in tuned if name.startswith(f"{path}.")}
    last = max(index for index, name in enumerate(tuned) if name in number)
    result = {}
    for index, (name, value) in enumerate(tuned.items()):
        if not value.is_floating_point() or _is_under(name, keep):
            result[name] = value.clone()
            continue
        outside = alpha if after is None or index < last else after
        factor = alpha + beta * number[name] / steps if name in number else outside
        old = pretrained[name].to(value)
        result[name] = value.clone() if factor == 1 else old + factor * (value - old)
    return result


def _is_under(name: str, paths: Sequence[str]) -> bool:
    return any(name == path or name.startswith(f"{path}.") for path in paths)


def _check_keys(pretrained: Mapping[str, Tensor], tuned: Mapping[str, Tensor], keep: Sequence[str]) -> None:
    unused = [path for path in keep if not any(_is_under(name, [path]) for name in tuned)]
    if unused:
        raise ConfigError("there is no entry at a path", where="keep", evidence=", ".join(unused))
    names = [name for name in {**pretrained, **tuned} if not _is_under(name, keep)]
    one_sided = [name for name in names if (name in pretrained) != (name in tuned)]
    reshaped = [name for name in names if name not in one_sided and pretrained[name].shape != tuned[name].shape]
    if one_sided or reshaped:
        what = "only one checkpoint has an entry" if one_sided else "an entry has another shape in the two checkpoints"
        shown = (one_sided or reshaped)[:3]
        raise DataError(what, where=", ".join(shown), fix="name what is new in keep=[...]")


def _block_paths(names: Mapping[str, Tensor], blocks: str | Sequence[str] | None) -> list[str]:
    rows = _numbered(names)
    if isinstance(blocks, str):
        found = next((row for prefix, row in rows.items() if prefix.rstrip(".") == blocks or prefix == blocks), [])
    elif blocks is not None:
        found = list(blocks)
    else:
        alike = [row for row in rows.values() if len(row) > 1 and _are_alike(names, row)]
        outer = [row for row in alike if not any(row[0].startswith(f"{path}.") for other in alike if other is not row for path in other)]
        if len(outer) != 1:
            seen = ", ".join(row[0] for row in outer) or "none"
            raise ConfigError("the blocks cannot be told", evidence=f"rows that start at: {seen}", fix="pass blocks=")
        found = outer[0]
    missing = [path for path in found if not any(name.startswith(f"{path}.") for name in names)]
    if missing or not found:
        raise ConfigError("there are no such blocks", where="blocks", evidence=", ".join(missing) or repr(blocks))
    return found


def _numbered(names: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """What stands before a number -> the paths with such numbers, in the order of the numbers."""
    rows: dict[str, dict[int, str]] = defaultdict(dict)
    for name in names:
        parts = name.split(".")
        for depth, part in enumerate(parts[:-1]):
            if matched := _NUMBER.match(part):
                rows[".".join([*parts[:depth], matched[1]])][int(matched[2])] = ".".join(parts[: depth + 1])
    return {prefix: [row[number] for number in sorted(row)] for prefix, row in rows.items()}


def _are_alike(names: Mapping[str, Tensor], row: Sequence[str]) -> bool:
    forms = [{name.removeprefix(f"{path}."): value.shape for name, value in names.items() if name.startswith(f"{path}.")} for path in row]
    return all(form == forms[0] for form in forms)
