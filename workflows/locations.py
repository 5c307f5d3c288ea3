"""Where a store is, as an argument: a path, or a URL that stays as it was given."""

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter, Token

from pipeline.storage.objects import Location


def _location(_: Any, tokens: list[Token]) -> Location:
    text = tokens[0].value
    return text if "://" in text else Path(text)


StoreLocation = Annotated[Location, Parameter(converter=_location)]
