"""The table of networks: snake name to builder. Importing it imports no network library.

A builder takes keyword-only plain arguments, whose annotations are the bounds a plan is checked against:
`in_channels`, `out_channels` (K) and `dimensions` are given by the task, the rest stands in the plan. What it
returns depends on the shape of its entry:

- `map`: `B C H W[D]` to `B K H W[D]` logits. In training it may return a tuple of such logits, the main ones
  first (deep supervision, side outputs); in evaluation it returns the main ones alone.
- `vector`: `B C H W[D]` to `B K` logits, from any size of 32 and more; with `dimensions` 0 from `B C`
  (features, a table). It is a `tasks.networks.trunk.Trunk`: maps, pool and head can be had apart.
- `generator`: noise `B Z` (Z: `in_channels`) and classes `B` to images `B C H W[D]` in -1 to 1; it is given
  `sides` and `classes` too.
- `discriminator`: images `B C H W[D]` and classes `B` to scores `B 1` or `B 1 h w[d]`; given `classes`, no
  `out_channels`.

No entry normalises over the batch: examples of one batch must not see each other (a patient's gradient could
not be clipped else).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from conf.exits import Exit, Stop
from conf.schema import Section
from conf.table import Table

Shape = Literal["map", "vector", "generator", "discriminator"]


@dataclass(frozen=True)
class Network:
    """One entry.

    Attributes:
        builder: where its code stands.
        shape: what it makes of an image.
        gradients: how it gives the gradient of one patient under DP: all patients in one pass, one after the
            other, or not at all.
        dimensions: of the images that it takes.
    """

    builder: str
    shape: Shape
    gradients: Literal["vmap", "loop", "no DP"] = "vmap"
    dimensions: tuple[int, ...] = (2, 3)


NETWORKS: Mapping[str, Network] = {
    "unet": Network("tasks.networks.unet:unet", "map"),
    "basic_unet": Network("tasks.networks.unet:basic_unet", "map"),
    "dyn_unet": Network("tasks.networks.unet:dyn_unet", "map"),
    "unet_plus_plus": Network("tasks.networks.unet:unet_plus_plus", "map"),
    "seg_res_net": Network("tasks.networks.unet:seg_res_net", "map"),
    "attention_unet": Network("tasks.networks.ladder:attention_unet", "map"),
    "residual_unet": Network("tasks.networks.ladder:residual_unet", "map"),
    "dense_unet": Network("tasks.networks.ladder:dense_unet", "map"),
    "v_net": Network("tasks.networks.ladder:v_net", "map"),
    "recurrent_unet": Network("tasks.networks.recurrent:recurrent_unet", "map", dimensions=(3,)),
    "fcn": Network("tasks.networks.plain:fcn", "map"),
    "hed": Network("tasks.networks.plain:hed", "map"),
    "deep_medic": Network("tasks.networks.plain:deep_medic", "map"),
    "srcnn": Network("tasks.networks.plain:srcnn", "map"),
    "unetr": Network("tasks.networks.unetr:unetr", "map"),
    "swin_unetr": Network("tasks.networks.swin:swin_unetr", "map"),
    "scale_space": Network("tasks.networks.scale_space:scale_space", "map"),
    "resnet": Network("tasks.networks.resnet:resnet", "vector"),
    "ws_resnet": Network("tasks.networks.resnet:ws_resnet", "vector"),
    "senet": Network("tasks.networks.resnet:senet", "vector"),
    "densenet": Network("tasks.networks.densenet:densenet", "vector"),
    "efficientnet": Network("tasks.networks.efficientnet:efficientnet", "vector"),
    "inception": Network("tasks.networks.inception:inception", "vector"),
    "vgg": Network("tasks.networks.small:vgg", "vector"),
    "alexnet": Network("tasks.networks.small:alexnet", "vector"),
    "vit": Network("tasks.networks.vit:vit", "vector"),
    "lenet": Network("tasks.networks.small:lenet", "vector"),
    "convnet": Network("tasks.networks.small:convnet", "vector"),
    "linear": Network("tasks.networks.tabular:linear", "vector", dimensions=(0,)),
    "mlp": Network("tasks.networks.tabular:mlp", "vector", dimensions=(0,)),
    "dcgan": Network("tasks.networks.gan:dcgan", "generator"),
    "residual_generator": Network("tasks.networks.gan:residual_generator", "generator"),
    "dcgan_discriminator": Network("tasks.networks.gan:dcgan_discriminator", "discriminator"),
    "residual_discriminator": Network("tasks.networks.gan:residual_discriminator", "discriminator"),
    "patch_gan": Network("tasks.networks.gan:patch_gan", "discriminator"),
}

MODELS = Table("model", {name: entry.builder for name, entry in NETWORKS.items()})


def network(section: Section, shape: Shape, *, dimensions: int, **given: Any) -> Any:
    """The network that a section names, which must be of this shape and take such input.

    Args:
        dimensions: of its input; 0: features or a table. given: what else the task knows.

    Raises:
        Stop: (`UNKNOWN_NAME`, `CONFIG`) it is none, with those that are.
    """
    fitting = [n for n, entry in NETWORKS.items() if entry.shape == shape and dimensions in entry.dimensions]
    if section.name in NETWORKS and section.name not in fitting:
        words = {"map": "network of maps", "vector": "network of vectors"}.get(shape, shape)
        of = f"{dimensions}D images" if dimensions else "features or tables"
        raise Stop(Exit.CONFIG, f"{section.name!r} is no {words} for {of}; those are {', '.join(fitting)}")
    return MODELS.build(section, dimensions=dimensions, **given)


#: what `Network.gradients` says, by name
GRADIENTS = {name: entry.gradients for name, entry in NETWORKS.items()}

#: pools over the instances of a bag, `B N F` and a mask `B N` to `B features`; each is told `features`
POOLS = Table(
    "pool",
    {
        "mean": "tasks.networks.pooling:mean",
        "maximum": "tasks.networks.pooling:maximum",
        "attention": "tasks.networks.pooling:attention",
        "gated_attention": "tasks.networks.pooling:gated_attention",
        "quantiles": "tasks.networks.pooling:quantiles",
        "lstm": "tasks.networks.pooling:lstm",
    },
)
