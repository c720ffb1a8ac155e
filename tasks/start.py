"""What a process that lives long imports before its first job, while nobody waits for it."""

from __future__ import annotations

import sys

HEAVY = ("tasks.networks.unet", "tasks.predict")


def without_plots() -> None:
    """Let MONAI find no matplotlib, which it would import for notebooks: 0.4 s, and a scan for fonts."""
    sys.modules.setdefault("matplotlib", None)  # type: ignore[arg-type]
