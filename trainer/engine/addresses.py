"""Names, addresses and network interfaces of this machine. Imports no torch."""

from __future__ import annotations

import socket
from contextlib import suppress

_LOOPBACK = ("localhost", "localhost.localdomain", "::1")


def is_loopback(name: str) -> bool:
    """Tell whether a name or address in writing means "this machine" on every machine."""
    return name in _LOOPBACK or name.startswith("127.")


def is_this_machine(name: str) -> bool:
    """Tell whether `name` is this machine's name or one of its addresses."""
    own = socket.gethostname()
    if is_loopback(name) or name in {own, own.partition(".")[0]}:
        return True
    for family, address in _addresses(name):
        with suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))  # only an address of our own can be bound
            return True
    return False


def free_port() -> int:
    """Return a TCP port that nobody listens on at the moment."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def interface_towards(name: str) -> str | None:
    """Return the network interface of this machine on the way to `name`; None: not found out.

    Nothing is sent. Loopback is no answer: a name that leads there is of this machine's own, and
    others would be told an address that they cannot reach.
    """
    import psutil

    for family, address in _addresses(name):
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))
            own = probe.getsockname()[0]
            for interface, entries in psutil.net_if_addrs().items():
                if any(entry.address.partition("%")[0] == own for entry in entries):
                    return None if is_loopback(own) else interface
    return None


def _addresses(name: str) -> list[tuple[socket.AddressFamily, str]]:
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return [(family, str(address[0])) for family, _, _, _, address in found]
