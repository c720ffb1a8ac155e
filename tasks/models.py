"""The table of networks: snake name to builder. Importing it imports no network library.

A builder takes keyword-only plain arguments, whose annotations are the bounds a plan is checked
against, and returns an `nn.Module` from `B C H W[D]` to `B K H W[D]` logits. No entry normalises over the
batch: examples of one batch must not see each other (a patient's gradient could not be clipped else).
"""

from collections.abc import Mapping
from typing import Literal

from conf.table import Table

MODELS = Table(
    "model",
    {
        "unet": "tasks.networks.unet:unet",
        "basic_unet": "tasks.networks.unet:basic_unet",
        "dyn_unet": "tasks.networks.unet:dyn_unet",
    },
)

#: how an entry gives the gradient of one patient under DP: all patients in one pass, one after the other, or
#: not at all
GRADIENTS: Mapping[str, Literal["vmap", "loop", "no DP"]] = {
    "unet": "vmap",
    "basic_unet": "vmap",
    "dyn_unet": "vmap",
}
