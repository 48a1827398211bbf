"""Audits one model of every timm family, every smp architecture and a set of torchvision models, on the meta device.

    python benchmarks/zoo.py [--only timm.resnet/] [--output benchmarks/results/zoo.csv]

Each model is read as shipped and, where its constructor takes one, with dropout switched on. The CSV has one row per
model and form: what was read, how many findings each rule gave (previews included), and what crashed.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich.progress
import torch
from torch import nn

from pl_normkit.auditing import audit_subject, traced
from pl_normkit.graph import ModelGraph
from pl_normkit.rules import Subject, load_rules
from pl_normkit.selection import Selection
from pl_normkit.specs import build_model

RESULTS = Path(__file__).parent / "results" / "zoo.csv"
DROP_RATE = 0.1
BATCH = 2
ALSO = [
    "efficientnet_b0",
    "mobilenetv3_large_100",
    "repvgg_a0",
    "mobileone_s0",
    "mixer_s16_224",
    "resmlp_12_224",
    "poolformer_s12",
    "coatnet_0_rw_224",
    "dm_nfnet_f0",
    "eca_nfnet_l0",
    "regnetx_002",
    "regnety_002",
    "resnet18",
    "resnet50",
    "seresnet50",
    "resnet50_clip",
    "resnetv2_50",
    "resnetv2_50x1_bit",
    "vgg11_bn",
    "mobilevitv2_050",
    "ecaresnet26t",
    "wide_resnet50_2",
    "convnextv2_atto",
    "swin_tiny_patch4_window7_224",
    "densenetblur121d",
]
TORCHVISION = [
    "resnet18",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "densenet121",
    "vgg11_bn",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "mnasnet0_5",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "googlenet",
    "inception_v3",
    "regnet_y_400mf",
    "convnext_tiny",
    "vit_b_16",
    "swin_t",
    "swin_v2_t",
    "maxvit_t",
    "wide_resnet50_2",
    "alexnet",
]
TORCHVISION_SEGMENTATION = ["deeplabv3_resnet50", "deeplabv3_mobilenet_v3_large", "fcn_resnet50", "lraspp_mobilenet_v3_large"]
SIZES = {"inception_v3": 299}
SMALL_FIRST = [
    "atto",
    "femto",
    "pico",
    "nano",
    "mini",
    "tiny",
    "xxxs",
    "xxs",
    "xs",
    "xxsmall",
    "xsmall",
    "small",
    "micro",
    "zepto",
    "lite",
    "t",
    "s",
    "s0",
    "b0",
    "a0",
    "x0",
    "m0",
    "t0",
    "e1",
    "b1",
    "m1",
    "a1",
    "s1",
    "18",
    "14",
    "10",
    "11",
    "12",
    "13",
    "16",
    "19",
    "20",
    "21",
    "22",
    "24",
    "25",
    "26",
    "28",
    "34",
    "38",
    "39",
    "41",
    "42",
    "48",
    "50",
    "base",
    "b",
    "medium",
    "m",
    "101",
    "x",
    "l",
    "large",
    "xl",
    "xlarge",
    "huge",
    "h",
    "giant",
    "gigantic",
    "enormous",
]


@dataclass(frozen=True)
class Case:
    """One model of the zoo: which library family it stands for, and how to build it."""

    family: str
    name: str
    form: str
    build: Callable[[], nn.Module]
    size: tuple[int, ...] | None = None


def cases() -> Iterator[Case]:
    """Every case, in a fixed order."""
    yield from timm_cases()
    yield from smp_cases()
    yield from torchvision_cases()


def timm_cases() -> Iterator[Case]:
    """The smallest-sounding real variant of each timm family, and well-known others that are built differently."""
    import timm
    from timm.models._registry import _module_to_models

    for family, members in sorted(_module_to_models.items()):
        smallest = min((name for name in members if not name.startswith("test_")), key=_smallness)
        for name in dict.fromkeys([smallest, *(name for name in ALSO if name in members)]):
            for form, arguments in (("shipped", {}), ("dropout", {"drop_rate": DROP_RATE})):
                yield Case(f"timm.{family}", name, form, lambda name=name, arguments=arguments: timm.create_model(name, **arguments))


def smp_cases() -> Iterator[Case]:
    """Every architecture of segmentation_models_pytorch on resnet18, the transformer ones on an encoder they take."""
    import segmentation_models_pytorch as smp

    encoders = {"dpt": "tu-vit_tiny_patch16_224"}
    aux = {"classes": 3, "pooling": "avg", "dropout": DROP_RATE}
    for name in sorted(smp.MODEL_ARCHITECTURES_MAPPING):
        shared = {"encoder_name": encoders.get(name, "resnet18"), "encoder_weights": None}
        for form, arguments in (("shipped", {}), ("dropout", {"aux_params": aux})):
            options = {**shared, **arguments}
            size = (3, 224, 224) if name == "dpt" else (3, 256, 256)
            yield Case(f"smp.{name}", name, form, lambda name=name, options=options: smp.create_model(name, **options), size)


def torchvision_cases() -> Iterator[Case]:
    """Classification and segmentation models of torchvision, as they come (their dropouts are on)."""
    for name in (*TORCHVISION, *TORCHVISION_SEGMENTATION):
        side = SIZES.get(name, 224)
        yield Case(f"torchvision.{name}", name, "shipped", lambda name=name: build_model(f"torchvision:{name}"), (3, side, side))


def _smallness(name: str) -> tuple[float, int, str]:
    words = re.split(r"[_.]|(?<=[a-z])(?=\d)|(?<=\d)(?=[a-z])", name)
    ranks = [SMALL_FIRST.index(word) for word in words if word in SMALL_FIRST]
    return (min(ranks, default=len(SMALL_FIRST)), len(name), name)


def read_case(case: Case, codes: list[str]) -> dict[str, Any] | None:
    """One row of the table; None where the constructor takes no dropout rate."""
    row: dict[str, Any] = {"family": case.family, "model": case.name, "form": case.form, "crash": ""}
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = case.build()
    except TypeError as error:
        if case.form == "dropout" and ("drop_rate" in str(error) or "aux_params" in str(error)):
            return None
        return {**row, "crash": f"build: {type(error).__name__}: {error}"}
    except Exception as error:
        return {**row, "crash": f"build: {type(error).__name__}: {str(error).splitlines()[0]}"}
    started = time.perf_counter()
    inputs = (torch.zeros(BATCH, *_size(model, case), device="meta"),)
    found, graph = read_findings(Subject(model=model, example_inputs=inputs, measure=False), codes)
    row |= {**found, "seconds": round(time.perf_counter() - started, 2)}
    return {**row, **(read_counts(graph) if graph is not None else {})}


def read_findings(subject: Subject, codes: list[str]) -> tuple[dict[str, Any], ModelGraph | None]:
    """The part of a row that every rule, previews included, writes, and the graph they read."""
    subject = traced(subject)
    report = audit_subject(subject, Selection(select=["ALL"]))
    found = {"crash": " | ".join(" ".join(str(note).split()) for note in report.notes), **dict.fromkeys(codes, 0)}
    found |= Counter(finding.code for finding in report.findings)
    found["places"] = " ".join(f"{finding.code}@{finding.places[0].module}" for finding in report.findings if finding.places)
    return found, subject.graph


def _size(model: nn.Module, case: Case) -> tuple[int, ...]:
    return case.size or tuple(model.pretrained_cfg["input_size"])


def read_counts(graph: ModelGraph) -> dict[str, int]:
    """How many structures of each kind it holds."""
    kinds = Counter(norm.kind for norm in graph.norms)
    adds = Counter(add.kind for add in graph.residual_adds)
    return {
        "operations": len(graph.nodes),
        "identity_adds": adds["identity"],
        "projection_adds": adds["projection"],
        **{f"{kind}_norms": kinds[kind] for kind in ("batch", "layer", "group", "instance", "rms")},
        "dropouts": len(graph.dropouts),
        "active_dropouts": sum(dropout.p > 0 for dropout in graph.dropouts),
        "heads": len(graph.heads),
        "fusions": len(graph.fusions),
        "attentions": len(graph.attentions),
    }


COLUMNS = [
    "family",
    "model",
    "form",
    "seconds",
    "operations",
    "identity_adds",
    "projection_adds",
    "batch_norms",
    "layer_norms",
    "group_norms",
    "instance_norms",
    "rms_norms",
    "dropouts",
    "active_dropouts",
    "heads",
    "fusions",
    "attentions",
]
Key = tuple[str, str, str]


def key_of(row: dict[str, Any]) -> Key:
    return row["family"], row["model"], row["form"]


def read_table(path: Path) -> dict[Key, dict[str, Any]]:
    """Rows of an earlier run by family, model and form."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {key_of(row): row for row in csv.DictReader(file)}


def write_table(path: Path, rows: dict[Key, dict[str, Any]], codes: list[str], more: Sequence[str] = ()) -> None:
    """Write all rows; called after each model, so that an interrupted run keeps what it has read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *more, *codes, "places", "crash"], restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[key] for key in sorted(rows))


def main() -> int:
    """Read the zoo; exit status 1 when anything crashed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of FAMILY/MODEL/FORM: read these, keep the other rows of the table")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    codes = sorted(load_rules())
    chosen = [case for case in cases() if options.only in f"{case.family}/{case.name}/{case.form}"]
    rows = read_table(options.output) if options.only else {}
    for case in rich.progress.track(chosen, description="reading the zoo"):
        row = read_case(case, codes)
        if row is not None:
            rows[key_of(row)] = row
            write_table(options.output, rows, codes)
    crashed = [row for row in rows.values() if row["crash"]]
    print(f"{len(rows)} rows, {len({row['model'] for row in rows.values()})} models, {len(crashed)} crashes; written to {options.output}")
    for row in crashed:
        print(f"  {row['family']} {row['model']} ({row['form']}): {row['crash'][:300]}")
    return int(bool(crashed))


if __name__ == "__main__":
    sys.exit(main())
