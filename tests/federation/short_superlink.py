"""Flower's SuperLink, whose leases of tasks are short."""

from flwr.common import constant

LEASE_S = 6.0


def shorten() -> None:
    """Before anything of Flower's reads them."""
    constant.HEARTBEAT_DEFAULT_INTERVAL = LEASE_S / 2  # type: ignore[assignment]
    # heartbeats pause for the interval less this: at its own 5 s they would not pause at all
    constant.HEARTBEAT_CALL_TIMEOUT = LEASE_S / 6  # type: ignore[assignment]


if __name__ == "__main__":
    shorten()
    from flwr.superlink.cli import flower_superlink

    flower_superlink()
