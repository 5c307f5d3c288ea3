"""Searching a STAC API, at an address such as `stac+https://host/v1?collections=a&datetime=2023`."""

import warnings
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from pipeline.errors import ArchiveError, ConfigError, SceneError
from pipeline.locations import check_allowed, is_url, reason_of
from pipeline.scenes import Access

PREFIX = "stac+"
# What may stand in the address, and how the client wants it; lists are comma-separated.
_PARAMETERS = ("bbox", "collections", "datetime", "filter", "ids", "limit", "max_items", "query")
MAX_ITEMS = 5_000_000
_TIMEOUT_S = (10.0, 120.0)
_RETRIES = 3
_BUSY = (429, 502, 503, 504)


def is_search(location: str) -> bool:
    """Whether a location is the address of a search."""
    return location.startswith(PREFIX)


def search_parts(location: str) -> tuple[str, dict[str, Any]]:
    """The API's own URL, and the arguments of the search. Raises ConfigError for what it cannot take."""
    parts = urlsplit(location.removeprefix(PREFIX))
    arguments: dict[str, Any] = {}
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if name not in _PARAMETERS:
            raise ConfigError(
                f"{location}: parameter {name!r} is not known; expected one of {', '.join(_PARAMETERS)}"
            )
        if name == "query":
            arguments.setdefault("query", []).append(value)
        elif name in arguments:
            raise ConfigError(f"{location}: {name} is given twice; give it once")
        else:
            arguments[name] = _argument(location, name, value)
    if not arguments.keys() & {"bbox", "collections", "datetime", "filter", "ids", "query"}:
        raise ConfigError(
            f"{location}: searches for everything there is; give collections, bbox or datetime"
        )
    return urlunsplit((*parts[:3], "", "")), arguments


def search_items(location: str, access: Access) -> Iterator[Any]:
    """Every item that a search finds, as the API sends it.

    Only addresses below `access.roots` are asked, whatever the API links to, and redirects are not
    followed. Raises ImportError without pystac-client, ArchiveError for an API that does not answer.
    """
    from pystac_client import Client

    url, arguments = search_parts(location)
    connection = _connection(access)
    try:
        with warnings.catch_warnings():
            # An API that does not say which version it conforms to still answers.
            warnings.simplefilter("ignore")
            client = Client.open(url, stac_io=connection, timeout=_TIMEOUT_S)
            search = client.search(**arguments)
        yield from _bounded(location, search.items_as_dicts())
    except ArchiveError:
        raise
    except Exception as error:
        raise ArchiveError(
            f"{url} does not answer a STAC search: {reason_of(error)}; check the address"
        ) from None
    finally:
        connection.session.close()


def _connection(access: Access) -> Any:
    """What the client reads through: only allowed addresses, no local files, no redirects."""
    from pystac.link import Link
    from pystac_client.stac_api_io import StacApiIO
    from urllib3 import Retry

    class Checked(StacApiIO):
        def read_text(self, source: Any, *args: Any, **kwargs: Any) -> str:
            # The client opens what is no URL as a local file.
            if not isinstance(source, Link) and not is_url(str(source)):
                raise SceneError(f"its search leads to {str(source)[:200]!a}; expected a URL")
            return super().read_text(source, *args, **kwargs)

        def request(self, href: str, method: str | None = None, *args: Any, **kwargs: Any) -> str:
            check_allowed(href, access)
            if (method or "GET").upper() not in ("GET", "POST"):
                raise SceneError(f"its search asks for the method {method!a:.20}; expected POST")
            return super().request(href, method, *args, **kwargs)

    retries = Retry(_RETRIES, backoff_factor=0.2, status_forcelist=_BUSY, allowed_methods=None)
    connection = Checked(max_retries=retries)
    connection.session.max_redirects = 0
    return connection


def _argument(location: str, name: str, value: str) -> Any:
    try:
        if name in ("limit", "max_items"):
            return int(value)
        if name == "bbox":
            return [float(part) for part in value.split(",")]
    except ValueError:
        raise ConfigError(f"{location}: {name} is {value!r}; expected numbers") from None
    return value.split(",") if name in ("collections", "ids") else value


def _bounded(location: str, items: Iterator[Any]) -> Iterator[Any]:
    for number, item in enumerate(items):
        if number == MAX_ITEMS:
            raise ArchiveError(
                f"{location} finds more than {MAX_ITEMS} items; narrow the search, or give a "
                "stac-geoparquet file"
            )
        yield item
