"""`pl-normkit run RECIPE export`: the trained and fixed network as ONNX, as an exported program or as a plain checkpoint."""

from __future__ import annotations

__all__ = ["export", "export_network", "run_or_export"]

import argparse
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from torch import Tensor, nn

from pl_normkit.errors import ConfigError
from pl_normkit.methods.fusion_scale import ScaleEqualizer, fold
from pl_normkit.methods.norm_placement import fold_placed_gains
from pl_normkit.methods.norm_placement.modules import ConstantGain
from pl_normkit.recipes.command_line import RecipeCLI, run_recipe
from pl_normkit.recipes.recipe import ExportForm, Recipe


def run_or_export(recipe: Recipe, args: Sequence[str]) -> int:
    """Run the recipe with the arguments after its name, `export` being a command beside those of `run_recipe`."""
    return export(recipe, args[1:]) if args[:1] == ["export"] else run_recipe(recipe, args)


def export(recipe: Recipe, args: Sequence[str]) -> int:
    """Run the command with the arguments after `export`. Returns 0. Raises NormkitError for bad input.

    The options are those of the training; without `--config`, they are read from the `config.yaml` that the training left beside the
    folder of its checkpoints. Callbacks that edit the network do so again, so that it is the one that was trained.
    """
    try:
        options, rest = _parse(recipe.name, recipe.form, args)
    except SystemExit as stop:
        return int(stop.code or 0)
    beside = options.ckpt_path.parent.parent / "config.yaml"
    if not any(word == "--config" or word.startswith("--config=") for word in rest) and beside.is_file():
        rest = ["--config", str(beside), *rest]
    cli = _export_cli(recipe.cli, recipe.form, options.to, options.size)
    with warnings.catch_warnings():
        # Those of a training that is over: its ModelCheckpoint is not needed here.
        warnings.filterwarnings("ignore", message=r"Be aware that when using `ckpt_path`, callbacks")
        return run_recipe(replace(recipe, cli=cli), ["test", *rest, f"--ckpt_path={options.ckpt_path}"])


def _parse(recipe: str, form: ExportForm, args: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog=f"pl-normkit run {recipe} export",
        allow_abbrev=False,
        description="Write the trained network to a file that this library is not needed for.",
        epilog=f"Every other option is one of `pl-normkit run {recipe} test`.",
    )
    parser.add_argument("--ckpt_path", type=Path, required=True, metavar="FILE", help="a checkpoint that `fit` wrote")
    forms = ", ".join(f"{suffix} ({what})" for suffix, what in form.formats.items())
    parser.add_argument("--to", type=Path, required=True, metavar="FILE", help=f"what to write, by its suffix: {forms}")
    if form.stride:
        about = f"pixels of the images, multiples of {form.stride} (default: the training crop)"
        parser.add_argument("--size", metavar="SIDE|H,W", help=about)
    options, rest = parser.parse_known_args(args)
    if options.to.suffix not in form.formats:
        raise ConfigError("there is no such export format", where="--to", evidence=str(options.to), fix=f"one of {forms}")
    if options.to.suffix == ".onnx":
        _require_onnx()
    options.size = _parse_size(options.size, form.stride) if form.stride and options.size else None
    return options, rest


def _parse_size(text: str, stride: int) -> tuple[int, int]:
    sides = text.split(",")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 and int(side) % stride == 0 for side in sides):
        raise ConfigError("the size cannot be used", where="--size", evidence=text, fix=f"multiples of {stride}, such as 512 or 512,1024")
    return int(sides[0]), int(sides[-1])


def _require_onnx() -> None:
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"{' and '.join(missing)} are needed for ONNX", where="--to", fix="pip install 'pl_normkit[export]'")


def _export_cli(base: type[RecipeCLI], form: ExportForm, path: Path, size: tuple[int, int] | None) -> type[RecipeCLI]:
    """The recipe's command line, whose `test` restores the checkpoint, tests nothing and writes the network."""

    class ExportCLI(base):  # type: ignore[misc,valid-type]
        def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
            trainer: L.Trainer = self.build_bare_trainer(logger=False, limit_test_batches=0, enable_model_summary=False, **kwargs)
            return trainer

        def before_test(self) -> None:
            super().before_test()
            self.datamodule.setup = lambda stage: None  # no sample is read

        def after_test(self) -> None:
            example = self.model.example_input_array
            arguments = example if isinstance(example, tuple) else (example,)
            if size is not None:
                arguments = tuple(value.new_zeros(*value.shape[:2], *size) if value.dim() == 4 else value for value in arguments)
            lines = [f"network:    {path}"]

            def build() -> nn.Module:
                bare = form.build(self)
                lines.append(f"loads into: {bare.call}")
                return bare.network

            arguments = tuple(tensor.cpu() for tensor in arguments)
            export_network(self.model.network.cpu(), path, arguments, build, form.inputs, form.output)
            for line in [*lines, *form.notes(self)]:
                Console().print(line, soft_wrap=True, highlight=False, markup=False)

    return ExportCLI


def export_network(
    network: nn.Module,
    path: Path,
    arguments: tuple[Tensor, ...],
    build: Callable[[], nn.Module],
    inputs: Sequence[str] = ("images",),
    output: str = "logits",
) -> None:
    """Write `network` in the format that the suffix of `path` names. It is left in evaluation mode, and what can be folded exactly is.

    Args:
        network: from `arguments` to one tensor.
        path: .onnx, .pt2 or .pt; its folder is made.
        arguments: what it is called with: images (2, channels, H, W) of the size to export for, and tensors (2, ...) such as times; any
            batch size will do later.
        build: gives the bare network, whose keys and function a .pt file must have.
        inputs: names of the arguments.
        output: name of what comes out.

    Raises ConfigError for .pt where the bare network would not do the same.
    """
    network.eval()
    path.parent.mkdir(parents=True, exist_ok=True)
    if any(isinstance(module, ScaleEqualizer) for module in network.modules()):
        fold(network)
    if any(isinstance(module, ConstantGain) for module in network.modules()):
        fold_placed_gains(network)
    if path.suffix == ".pt":
        _require_same(network, build().eval(), tuple(torch.rand_like(value) if value.is_floating_point() else value for value in arguments))
        torch.save(network.state_dict(), path)
        return
    batch = torch.export.Dim("batch", min=1)
    shapes = tuple({0: batch} for _ in arguments)
    with torch.no_grad(), warnings.catch_warnings():
        # Of several inputs it names the shared batch axis once, and warns of each other one.
        warnings.filterwarnings("ignore", message="# The axis name", category=UserWarning)
        if path.suffix == ".pt2":
            torch.export.save(torch.export.export(network, arguments, dynamic_shapes=shapes), path)
            return
        torch.onnx.export(
            network,
            arguments,
            path,
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=list(inputs),
            output_names=[output],
            external_data=False,
            verbose=False,
        )


@torch.no_grad()
def _require_same(network: nn.Module, bare: nn.Module, arguments: tuple[Tensor, ...]) -> None:
    state, fix = network.state_dict(), "export to .onnx or .pt2, which hold the whole computation"
    differing = sorted(state.keys() ^ bare.state_dict().keys())
    if differing:
        more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
        raise ConfigError("the network has other weights than its bare architecture", evidence=", ".join(differing[:4]) + more, fix=fix)
    bare.load_state_dict(state)
    expected, found = network(*arguments), bare(*arguments)
    scale = expected.abs().max()
    if not torch.allclose(expected, found, rtol=1e-4, atol=1e-4 * float(scale)):
        raise ConfigError(
            "the bare architecture computes something else with these weights: an edit is not among them",
            evidence=f"outputs differ by {float((expected - found).abs().max()):.3g} where the largest is {float(scale):.3g}",
            fix=fix,
        )
