"""The networks of the table, as small as they can be tried."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from conf.schema import Section
from tasks.models import MODELS, NETWORKS

MAPS = [name for name, entry in NETWORKS.items() if entry.shape == "map"]
ENTRIES = [(name, d) for name in MAPS for d in NETWORKS[name].dimensions]
PLAYERS = [name for name, entry in NETWORKS.items() if entry.shape in ("generator", "discriminator")]
LEVELS = {"channels": [4, 4, 8]}
#: their five levels leave one voxel of 16, which only a norm over channels can take
SIX = {"channels": [4, 4, 4, 4, 4, 4], "norm": "group"}
#: settings of each, and what they leave to their defaults when there is more than one way to train
SMALL: dict[str, dict[str, Any]] = {
    "unet": LEVELS,
    "basic_unet": SIX,
    "dyn_unet": LEVELS | {"deep_supervision": 1},
    "unet_plus_plus": SIX | {"deep_supervision": True},
    "seg_res_net": {"width": 4, "blocks": [1, 1, 1], "groups": 2},
    "attention_unet": LEVELS,
    "residual_unet": LEVELS,
    "dense_unet": LEVELS | {"growth": 4, "layers": 2},
    "v_net": LEVELS,
    "recurrent_unet": LEVELS,
    "fcn": {"channels": [4, 4, 8]},
    "hed": LEVELS,
    "deep_medic": {"channels": [4, 4], "hidden": 4},
    "srcnn": {"channels": [4, 4]},
    "unetr": {"width": 4, "hidden": 12, "heads": 2, "norm": "group"},
    "resnet": {"channels": [8, 8, 8, 16]},
    "ws_resnet": {"channels": [6, 8], "blocks": [1, 1], "groups": 2},
    "senet": {"channels": [8, 8, 8, 16], "squeeze": 2},
    "densenet": {"stem": 4, "growth": 4, "blocks": [1, 2]},
    "efficientnet": {"width": 0.1, "depth": 0.1},
    "inception": {"channels": [4, 8, 8]},
    "vgg": {"channels": [4, 6, 8], "hidden": [6], "groups": 2},
    "alexnet": {"channels": [4, 6, 6, 6, 4], "hidden": [8, 6]},
    "vit": {"width": 12, "heads": 2, "depth": 2, "inner": 12, "patch": 16},
    "lenet": {"channels": [3, 4], "hidden": [8, 6], "cells": 2},
    "convnet": {"channels": [4, 6, 8], "cells": 2},
    "mlp": {"channels": [8, 6]},
    **{name: {"width": 4, "levels": 2} for name in PLAYERS},
    "scale_space": {"scales": [1.0], "degree": 2, "joint": 1, "hidden": 4},
    "swin_unetr": {"depths": [1, 1, 1, 1], "heads": [1, 1, 1, 1], "window": 2, "norm": "group"},
}
#: of images and volumes, where not 16 along each axis; in one pass over patients Swin fails on a single token
SIDES = {
    "recurrent_unet": ((16, 16), (16, 16, 4)),
    "unetr": ((32, 32), (32, 32, 16)),
    "swin_unetr": ((64, 32), (32, 32, 32)),
}


def sides(name: str, dimensions: int) -> tuple[int, ...]:
    """What the small network takes."""
    return SIDES[name][dimensions - 2] if name in SIDES else (16,) * dimensions


def takes(name: str, setting: str) -> bool:
    """Whether the builder has such a setting."""
    return setting in inspect.signature(MODELS[name]).parameters


def section(name: str, **settings: Any) -> Section:
    """The small network's section of a plan."""
    return Section(name=name, **(SMALL.get(name, {}) | settings))


def small(name: str, dimensions: int, *, inputs: int = 1, classes: int = 2, **settings: Any) -> nn.Module:
    """The small network, always with the same weights."""
    torch.manual_seed(0)
    model: nn.Module = MODELS.build(
        section(name, **settings), in_channels=inputs, out_channels=classes, dimensions=dimensions
    )
    return model
