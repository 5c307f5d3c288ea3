"""Which addresses of the network may be connected to.

A catalogue may name any host, and a name server may give any address for it: the cloud's metadata
service, a database on this machine. So a host is resolved once, what it resolves to is checked, and the
connection goes to the very address that was checked.
"""

import ipaddress
import socket
from urllib.parse import urlsplit

from pipeline.errors import SceneError
from pipeline.fetch.retries import Passing
from pipeline.locations import is_url
from pipeline.scenes import Access

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
# Addresses of the old network inside the new one: RFC 6052.
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def addresses_of(host: str, port: int, access: Access) -> tuple[str, ...]:
    """The addresses of a host, in the order in which to try them; SceneError if one of them is private.

    Private is whatever is not part of the public internet. It is allowed where the user named this very
    address, or localhost, as a root, or with `access.allow_private_addresses`.
    """
    found = _resolved(host, port)
    for address in found:
        if not (
            access.allow_private_addresses
            or _is_public(address)
            or _is_named(host, address, access)
        ):
            raise SceneError(
                f"{host} is at {address}, a private address, which is not connected to; if the server is "
                "yours, set run.allow_private_addresses"
            )
    return tuple(dict.fromkeys(map(str, found)))


def _resolved(host: str, port: int) -> list[_Address]:
    try:
        return [ipaddress.ip_address(host)]
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        if error.errno == socket.EAI_AGAIN:
            raise Passing(f"{host} cannot be resolved just now") from None
        raise SceneError(
            f"{host} cannot be resolved ({error.strerror}); check the address"
        ) from None
    except (OSError, UnicodeError, ValueError) as error:
        raise SceneError(f"{host[:80]!a} is no name of a host ({error})") from None
    return [ipaddress.ip_address(entry[4][0]) for entry in found]


def _is_public(address: _Address) -> bool:
    inner = _inner(address)
    if inner is not None:
        return _is_public(inner)
    return address.is_global and not address.is_multicast


def _inner(address: _Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that packets to an IPv6 address reach in the end, if there is one."""
    if isinstance(address, ipaddress.IPv4Address):
        return None
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour


def _is_named(host: str, address: _Address, access: Access) -> bool:
    """Whether the user wrote this host himself, as an address or as localhost."""
    named = {urlsplit(root).hostname for root in access.roots if is_url(root)}
    if host not in named:
        return False
    return address.is_loopback if host == "localhost" else host == str(address)
