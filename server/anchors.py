"""The last head of each site's ledger, as the site told it: what finds a ledger that was rolled back.

A hospital's own files cannot show that they were all put back together. The coordinator sends a site its last
head with every plan and every ask that waits for all; a site whose ledger never had that head trains nothing
private until it is restored.
"""

from __future__ import annotations

import json
from pathlib import Path

from conf.exits import Exit, Stop
from conf.files import no_space, write_atomic
from strategies.protocol import Tree


class Anchors:
    """Heads by site, over all runs.

    Args:
        path: their file; None keeps them in memory.

    Raises:
        Stop: (`CONFIG`) the file holds something else.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._heads: dict[str, str] = {}
        if path is not None and path.exists():
            try:
                self._heads = {str(site): str(head) for site, head in json.loads(path.read_bytes()).items()}
            except (ValueError, AttributeError):
                text = f"{path} is no list of heads by site; put its backup in its place"
                raise Stop(Exit.CONFIG, text) from None

    def own(self, site: str) -> Tree:
        """What goes to a site with a plan."""
        return {"anchor": self._heads[site]} if site in self._heads else {}

    def note(self, site: str, head: str) -> None:
        """Keep a head, durably. Any that a ledger once had will do: an older answer may come later."""
        if not head or self._heads.get(site) == head:
            return
        self._heads[site] = head
        if self._path is not None:
            with no_space(self._path, "wardround resume"):
                write_atomic(self._path, (json.dumps(self._heads, indent=1, sort_keys=True) + "\n").encode())
