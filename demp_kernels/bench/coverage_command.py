"""`demp coverage`: the models, flags, progress and files of the coverage table."""
from __future__ import annotations

import argparse
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..recipes.errors import RecipeError, need
from .coverage import CoverageRow, cells, cover, write_coverage

__all__ = ["FAMILIES", "add_parser"]

FAMILIES = (
    "resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "vgg11_bn", "alexnet", "mobilenet_v2", "mobilenet_v3_small",
    "efficientnet_b0", "efficientnet_v2_s", "densenet121", "googlenet", "inception_v3", "convnext_tiny", "vit_b_16", "swin_t",
    "swin_v2_t", "maxvit_t", "regnet_x_400mf", "regnet_y_400mf", "shufflenet_v2_x1_0", "squeezenet1_1", "mnasnet1_0",
    "segmentation/deeplabv3_resnet50", "segmentation/fcn_resnet50", "segmentation/lraspp_mobilenet_v3_large",
    "backbone/resnet50_fpn",
    "timm/resnet26d", "timm/convnext_atto", "timm/mobilenetv3_small_050", "timm/vit_tiny_patch16_224",
)
"""One of each family: torchvision's classification and segmentation models, a backbone of its detection models, and some of
timm's where it is installed."""
SIDES = {"inception_v3": 96, "vit": 224, "swin": 64, "maxvit_t": 224, "timm/vit_tiny_patch16_224": 224}
"""Side of the images, by the longest prefix; 64 otherwise."""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "coverage", help="which models can be compacted, how far, and how exactly",
        description="Makes half of the units of each model zero, compacts it, and compares outputs before and after.",
    )
    parser.add_argument("models", nargs="*", metavar="model", help=f"default: {', '.join(FAMILIES)}")
    parser.add_argument("--all", action="store_true", help="all of torchvision's classification models: hours")
    parser.add_argument("--out", type=Path, help="folder for coverage.csv and coverage.md (default: only printed)")
    parser.set_defaults(run=_run)


def _run(chosen: argparse.Namespace) -> int:
    for module in ("rich", "torchvision"):
        need(module, "demp coverage")
    from rich.console import Console

    if chosen.out is not None and chosen.out.exists() and not chosen.out.is_dir():
        raise RecipeError(f"out must be a folder, got the file {chosen.out}")
    names = list(chosen.models) or _models(chosen.all)
    builders = [(name, _builder(name)) for name in names]  # an unknown name is an error before hours of work
    console = Console()
    rows: list[CoverageRow] = []
    for name, build in builders:
        with console.status(f"{name} ({len(rows) + 1} of {len(names)})"):
            side = next((SIDES[p] for p in sorted(SIDES, key=len, reverse=True) if name.startswith(p)), 64)
            rows.append(cover(name, build, torch.randn(2, 3, side, side)))
        console.print(_line(rows[-1]), highlight=False, soft_wrap=True)
        if chosen.out is not None:
            write_coverage(chosen.out, rows, f"torch {torch.__version__}, float64 on the CPU, {date.today().isoformat()}")
    return 0


def _models(every: bool) -> list[str]:
    if every:
        import torchvision

        return torchvision.models.list_models(module=torchvision.models)
    return [name for name in FAMILIES if not name.startswith("timm/") or _has_timm()]


def _has_timm() -> bool:
    try:
        import timm  # noqa: F401
    except ImportError:
        return False
    return True


def _builder(name: str) -> Callable[[], nn.Module]:
    """How to build a model, with random weights. Raises RecipeError for an unknown name."""
    from torchvision import models
    from torchvision.models.detection.backbone_utils import mobilenet_backbone, resnet_fpn_backbone

    kind, _, rest = name.rpartition("/")
    if kind == "timm":
        need("timm", f"demp coverage {name}")
        import timm

        if rest in timm.list_models():
            return lambda: timm.create_model(rest, pretrained=False)
    elif kind == "backbone" and rest.endswith("_fpn"):
        backbone = rest.removesuffix("_fpn")
        if backbone.startswith("resnet"):
            return lambda: resnet_fpn_backbone(backbone_name=backbone, weights=None, trainable_layers=5)
        return lambda: mobilenet_backbone(backbone_name=backbone, weights=None, fpn=True, trainable_layers=6)
    elif kind == "segmentation" and rest in models.list_models(module=models.segmentation):
        return lambda: models.get_model(rest, weights=None, weights_backbone=None)
    elif not kind and rest in models.list_models(module=models):
        # without their heads for training only, whose forward takes another path that `prepare` refuses
        options = {"init_weights": True, "aux_logits": False} if rest in ("googlenet", "inception_v3") else {}
        return lambda: models.get_model(rest, weights=None, **options)
    raise RecipeError(f"model must be one of torchvision's, segmentation/..., backbone/..._fpn or timm/..., got {name!r}")


def _line(row: CoverageRow) -> str:
    if row.refused:
        return f"{row.model}: refused: {row.refused}"
    model, units, removable, dead, removed, parameters, in_eval, in_training, kept = cells(row)
    stays = f"; stay: {kept}" if kept else ""
    return (
        f"{model}: {removable} of {units} units removable; {dead} zero, {removed} removed, {parameters} parameters; error "
        f"{in_eval} eval, {in_training} train; {row.seconds:.1f} s{stays}"
    )
