"""Facts that file names carry: patterns such as `{tile}_{date}_{band}_10m.tif`, and dates as text.

Pure. A name says something only where a pattern says so; without one no date is taken from a name.
Patterns become regular expressions in which all the user's text is literal, and which never go back
over text they have passed, so that no name takes long to match.
"""

import re
import unicodedata
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone

from pipeline.errors import ConfigError, SceneError

PLACEHOLDERS = ("tile", "date", "band", "baseline", "label", "split")
_TOKENS = re.compile(
    r"\{(?P<placeholder>[^{}]*)\}|(?P<folders>\*\*/)|(?P<any>\*)|(?P<text>[^*{}]+)|."
)

# Both forms have the groups year, month, day, hour, minute, second, zone, in this order.
_END = r"(?:\.\d{1,9})?)?(Z|[+-]\d{2}(?::?\d{2})?)?)?"
_EXTENDED = r"(\d{4})-(\d{2})(?:-(\d{2})(?:[T ](\d{2}):(\d{2})(?::(\d{2})" + _END + r"|(?!-\d))"
_BASIC = r"(\d{4})(\d{2})(?:(\d{2})(?:T(\d{2})(\d{2})(?:(\d{2})" + _END + ")?"
_ORDINAL = r"(\d{4})-(\d{3})"
_FORMS = tuple(re.compile(form, re.ASCII) for form in (_EXTENDED, _BASIC))
_YEARS = range(1900, 2200)
# What a directive of a date format matches in a name: widths are fixed where the form has one.
_DIRECTIVES = {
    "Y": r"\d{4}", "y": r"\d{2}", "m": r"\d{2}", "d": r"\d{2}", "j": r"\d{3}", "H": r"\d{2}",
    "M": r"\d{2}", "S": r"\d{2}", "f": r"\d{1,6}", "b": "[A-Za-z]{3}", "B": "[A-Za-z]{3,9}",
    "z": r"(?:Z|[+-]\d{2}:?\d{2})", "%": "%",
}  # fmt: skip
_SEPARATORS = ("_", "-", ".", " ")


@dataclass(frozen=True)
class NameMatch:
    """What a name says: text by placeholder, and where in the name the band stands."""

    texts: dict[str, str]
    band_spans: tuple[tuple[int, int], ...] = ()


class NamePattern:
    """How names are built, as in `{tile}/{date:%d%m%Y}_*_{band}.tif`.

    Placeholders stand for one or more characters, `*` for any number, both within one folder or file
    name and, from left to right, as few as lets what follows fit up to the next of them. `**/` stands
    for any number of folders. A pattern without a slash describes the file name, whatever folder it is
    in. A placeholder that occurs again must hold the same text. Upper and lower case differ.

    `{date}` matches, as far as possible, what `parse_datetime` reads, `{date:%d%m%Y}` what that format
    describes; `date_format` is used where the placeholder has none of its own. `{baseline}` is four
    digits, with or without N before and a point between. Raises ConfigError for a pattern that cannot
    be used.
    """

    def __init__(self, text: str, date_format: str | None = None) -> None:
        self.text, self.date_format = text, date_format
        self._placeholders: dict[str, list[str]] = {}
        if not text or text.startswith("/"):
            raise self._unusable(
                "it has to describe a path relative to the source", "start with a folder or name"
            )
        anywhere = "/" not in text
        self._regex = re.compile(self._compiled(f"**/{text}" if anywhere else text), re.ASCII)

    @property
    def names(self) -> frozenset[str]:
        """The placeholders that occur."""
        return frozenset(self._placeholders)

    def match(self, path: str) -> NameMatch | None:
        """What `path`, with forward slashes and relative to the modality's source, says; None if it
        is not built like this. The baseline comes as 04.00, the date as the name has it."""
        found = self._regex.match(path)
        if found is None:
            return None
        texts = {name: found[f"{name}_1"] for name in self._placeholders}
        if "baseline" in texts:
            texts["baseline"] = normal_baseline(texts["baseline"])
        numbers = range(1, len(self._placeholders.get("band", ())) + 1)
        return NameMatch(texts, tuple(found.span(f"band_{number}") for number in numbers))

    def _compiled(self, text: str) -> str:
        """Any text and what follows it, up to the next any text, is one atomic group.

        The first place where the fixed part fits is then the only one that is tried, which loses no
        match, since the next any text can take up what lies between.
        """
        pieces, any_before = ["(?>"], False
        for token in _TOKENS.finditer(text):
            piece, is_any = self._piece(token)
            if is_any and any_before:
                raise self._unusable(
                    f"nothing fixed separates {token[0]} from what is before it", "put text between"
                )
            pieces.append(f")(?>{piece}" if is_any else piece)
            any_before = is_any
        return "".join(pieces) + r"\Z)"

    def _piece(self, token: re.Match[str]) -> tuple[str, bool]:
        """The regular expression of one token, and whether it matches any text."""
        if token["text"] is not None:
            return re.escape(token["text"]), False
        if token["any"]:
            return "[^/]*?", True
        if token["folders"]:
            return self._folders(token), False
        if token["placeholder"] is None:
            raise self._unusable(f"{token[0]} has no counterpart", "write placeholders as {tile}")
        return self._placeholder(token["placeholder"])

    def _folders(self, token: re.Match[str]) -> str:
        before, rest = token.string[: token.start()], token.string[token.end() :]
        if (before and not before.endswith("/")) or "**/" in rest:
            raise self._unusable(
                "**/ stands once, at the beginning or after a slash", "use * within a name"
            )
        # Exactly as many folders as leave the number of slashes that the rest has.
        return rf"(?:[^/]+/)*?(?=(?:[^/]*/){{{rest.count('/')}}}[^/]*\Z)"

    def _placeholder(self, content: str) -> tuple[str, bool]:
        name, _, date_format = content.partition(":")
        if name not in PLACEHOLDERS:
            known = ", ".join(f"{{{known}}}" for known in PLACEHOLDERS)
            raise self._unusable(f"{{{content:.40}}} is not known", f"use {known}")
        if date_format and name != "date":
            raise self._unusable(f"{{{name}}} has no format", f"write {{{name}}}")
        seen = self._placeholders.setdefault(name, [])
        seen.append(content)
        if len(seen) > 1:
            if content not in (seen[0], name):
                raise self._unusable(
                    f"{{{seen[0]}}} and {{{content}}} differ", "replace one of them by *"
                )
            return f"(?P<{name}_{len(seen)}>(?P={name}_1))", False
        if name == "date":
            if date_format and self.date_format:
                raise self._unusable(
                    "dates.format has no effect beside a format in the pattern", "give one of them"
                )
            self.date_format = date_format or self.date_format
            return f"(?P<date_1>{_date_regex(self.date_format)})", False
        if name == "baseline":
            return r"(?P<baseline_1>(?<!\d)N?\d{2}\.?\d{2}(?!\d))", False
        return f"(?P<{name}_1>[^/]+?)", True

    def _unusable(self, problem: str, advice: str) -> ConfigError:
        return ConfigError(f"modality.pattern {self.text!r:.200}: {problem}; {advice}")


def _is_unprintable(character: str) -> bool:
    # Control characters, surrogates, line and paragraph separators.
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")


def _date_regex(date_format: str | None) -> str:
    if date_format is not None:
        return format_regex(date_format)
    forms = "|".join(re.sub(r"\((?!\?)", "(?:", form) for form in (_EXTENDED, _ORDINAL, _BASIC))
    # Not a part of a longer number.
    return rf"(?<!\d)(?:{forms})(?!\d)"


def without_band(path: str, spans: tuple[tuple[int, int], ...]) -> str:
    """`path` without its band: the text at `spans` is cut out with one separator (`_`, `-`, `.` or a
    space) beside it, the one before it if there is one, and folders left without a name vanish.

    T32_B02_10m becomes T32_10m, B02_T32 becomes T32, 2017/B02 becomes 2017; B02 becomes the empty text.
    """
    for start, stop in reversed(spans):
        before, after = path[:start], path[stop:]
        if before.endswith(_SEPARATORS):
            before = before[:-1]
        elif after.startswith(_SEPARATORS):
            after = after[1:]
        path = before + after
    return "/".join(part for part in path.split("/") if part)


def printable(text: str) -> str:
    """`text` with what would break a line, move a cursor or is not Unicode written as escapes."""
    if text.isprintable():
        return text
    return "".join(
        ascii(character)[1:-1] if _is_unprintable(character) else character for character in text
    )


def normal_baseline(text: str) -> str:
    """A processing baseline such as 0400 or N0400 as 04.00."""
    digits = text.removeprefix("N").replace(".", "")
    return f"{digits[:2]}.{digits[2:]}"


def format_regex(date_format: str) -> str:
    """A regular expression for the dates of a strptime format.

    Raises ConfigError for a format without a year or with directives that are not known.
    """
    letters = re.findall(r"%(.?)", date_format, re.DOTALL)
    used = [letter for letter in letters if letter != "%"]
    unknown = [f"%{letter}" for letter in used if letter not in _DIRECTIVES]
    if unknown or len(set(used)) != len(used) or not {"Y", "y"} & set(used):
        known = ", ".join(f"%{letter}" for letter in _DIRECTIVES)
        raise ConfigError(
            f"date format {date_format!r:.80} cannot be used; expected %Y or %y and others of {known}, "
            "each once"
        )
    parts = re.split(r"%(.)", date_format, flags=re.DOTALL)
    return "".join(
        _DIRECTIVES[part] if place % 2 else re.escape(part) for place, part in enumerate(parts)
    )


def parse_datetime(text: str, date_format: str | None = None) -> str:
    """A date as ISO 8601 in UTC, in whole seconds: 2017-09-18T00:00:00Z.

    Reads YYYY-MM-DD, YYYYMMDD, YYYY-MM, YYYYMM, YYYY-DDD (day of the year) and, after a whole date, a
    time with or without fractions (dropped) and offset from UTC (none means UTC). A month without a
    day is its first. With a strptime format only that is read. Raises SceneError for anything else.
    """
    text = text.strip()
    try:
        moment = _moment(text) if date_format is None else datetime.strptime(text, date_format)
        if moment.tzinfo is not None:
            moment = moment.astimezone(UTC).replace(tzinfo=None)
    except (ValueError, OverflowError) as error:
        expected = "ISO 8601, YYYYMMDD, or a format in dates.format"
        raise SceneError(
            f"its date {text!r:.80} cannot be read ({error}); expected {date_format or expected}"
        ) from None
    return moment.isoformat(timespec="seconds") + "Z"


def _moment(text: str) -> datetime:
    ordinal = re.fullmatch(_ORDINAL, text, re.ASCII)
    if ordinal:
        first = datetime(_year(ordinal[1]), 1, 1)
        moment = first + timedelta(days=int(ordinal[2]) - 1)
        if moment.year != first.year:
            raise ValueError(f"{first.year} has no day {ordinal[2]}")
        return moment
    found = next((match for form in _FORMS if (match := form.fullmatch(text))), None)
    if found is None:
        raise ValueError("its form is not known")
    year, month, day, hour, minute, second, zone = found.groups()
    date = datetime(_year(year), int(month), int(day or 1), tzinfo=_zone(zone))
    return date.replace(hour=int(hour or 0), minute=int(minute or 0), second=int(second or 0))


def _year(text: str) -> int:
    if int(text) not in _YEARS:
        raise ValueError(f"year {text} is not in {_YEARS.start} ... {_YEARS.stop - 1}")
    return int(text)


def _zone(text: str | None) -> timezone:
    if text is None or text == "Z":
        return UTC
    digits = text[1:].replace(":", "")
    offset = timedelta(hours=int(digits[:2]), minutes=int(digits[2:] or 0))
    return timezone(-offset if text[0] == "-" else offset)
