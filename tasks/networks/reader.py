"""A network of instances, what brings them together, a table beside it, one head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from conf.schema import Section
from tasks.models import POOLS
from tasks.networks.pooling import InstancePool
from tasks.networks.trunk import Trunk


class Reader(nn.Module):
    """`B [N] C *size` and a table `B T` to `B K`: the trunk reads each instance, a pool their features.

    Attributes:
        trunk: whose head is not used. pool: `B N F` to `B G`; none: there are no instances.
    """

    def __init__(self, trunk: Trunk, pool: InstancePool | None, width: int, outputs: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.trunk.head = nn.Identity()
        self.pool = pool
        features = trunk.features if pool is None else pool.features
        # a table counts as much as the image whatever the width of either
        self.fuse = nn.Linear(width, features) if width else None
        self.head = nn.Linear(features * (2 if width else 1), outputs)

    @classmethod
    def of(cls, trunk: nn.Module, pool: Section | None, width: int, outputs: int) -> Reader:
        """For a trunk of the table, and the entry of `POOLS` that `pool` names.

        Raises:
            ValueError: the network cannot be taken apart.
        """
        if not isinstance(trunk, Trunk):
            raise ValueError("task.view and task.columns need a network of vectors, with a head of its own")
        made = None if pool is None else POOLS.build(pool, features=trunk.features)
        return cls(trunk, made, width, outputs)

    def forward(self, image: Tensor, table: Tensor | None = None) -> Tensor:
        if self.pool is None:
            read = self.trunk(image)
        else:
            every = torch.ones(image.shape[:2], dtype=torch.bool, device=image.device)
            read = self.pool(self.trunk(image.flatten(0, 1)).unflatten(0, image.shape[:2]), every)
        if self.fuse is not None and table is not None:
            read = torch.cat([read, self.fuse(table).relu()], 1)
        logits: Tensor = self.head(read)
        return logits
