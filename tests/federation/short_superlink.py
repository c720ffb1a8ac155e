"""Flower's SuperLink, whose leases of tasks are short."""

from flwr.common import constant

LEASE_S = 8.0
constant.HEARTBEAT_DEFAULT_INTERVAL = LEASE_S / 2  # type: ignore[assignment]

if __name__ == "__main__":
    from flwr.superlink.cli import flower_superlink

    flower_superlink()
