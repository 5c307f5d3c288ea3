"""Searching a STAC API, at an address such as `stac+https://host/v1?collections=a&datetime=2023`."""

import json
import warnings
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from pipeline.errors import ArchiveError, ConfigError, SceneError
from pipeline.fetch.http import Question, ask
from pipeline.locations import check_allowed, is_url, reason_of
from pipeline.scenes import Access

PREFIX = "stac+"
# What may stand in the address, and how the client wants it; lists are comma-separated.
_PARAMETERS = ("bbox", "collections", "datetime", "filter", "ids", "limit", "max_items", "query")
MAX_ITEMS = 5_000_000


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
    try:
        with warnings.catch_warnings():
            # An API that does not say which version it conforms to still answers.
            warnings.simplefilter("ignore")
            client = Client.open(url, stac_io=_connection(access))
            search = client.search(**arguments)
        yield from _bounded(location, search.items_as_dicts())
    except ArchiveError:
        raise
    except Exception as error:
        raise ArchiveError(
            f"{url} does not answer a STAC search: {reason_of(error)}; check the address"
        ) from None


def _connection(access: Access) -> Any:
    """What the client reads through: only allowed addresses, no local files, no redirects."""
    from pystac.link import Link
    from pystac_client.stac_api_io import StacApiIO

    class Checked(StacApiIO):
        def read_text(self, source: Any, *args: Any, **kwargs: Any) -> str:
            # The client opens what is no URL as a local file.
            if not isinstance(source, Link) and not is_url(str(source)):
                raise SceneError(f"its search leads to {str(source)[:200]!a}; expected a URL")
            return super().read_text(source, *args, **kwargs)

        def request(
            self,
            href: str,
            method: str | None = None,
            headers: dict[str, str] | None = None,
            parameters: dict[str, Any] | None = None,
        ) -> str:
            check_allowed(href, access)
            question = _question(href, (method or "GET").upper(), headers or {}, parameters or {})
            return ask(question, access).data.decode()

    return Checked()


def _question(
    href: str, method: str, headers: dict[str, str], parameters: dict[str, Any]
) -> Question:
    if method not in ("GET", "POST"):
        raise SceneError(f"its search asks for the method {method!a:.20}; expected POST")
    if method == "GET":
        query = urlencode({k: v for k, v in parameters.items() if v is not None}, doseq=True)
        href += f"{'&' if '?' in href else '?'}{query}" if query else ""
        return Question(href, headers=tuple(headers.items()))
    kind = {"Content-Type": "application/json"}
    body = json.dumps(parameters).encode()
    return Question(href, method=method, headers=tuple({**headers, **kind}.items()), body=body)


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
