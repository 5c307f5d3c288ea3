import itertools
import re
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pipeline.errors import ConfigError, SceneError
from pipeline.sources.names import (
    PLACEHOLDERS,
    NamePattern,
    normal_baseline,
    parse_datetime,
    printable,
    without_band,
)

FREE = ("tile", "band", "label", "split")
PIECES = ["a", "b_", "_", "-", "/", "*", "**/", *(f"{{{name}}}" for name in FREE)]
DATE_FORMS = [
    "%Y-%m-%d",
    "%Y%m%d",
    "%Y-%j",
    "%Y%m%dT%H%M%S",
    "%Y%m%dT%H%M%SZ",
    "%Y-%m-%dT%H:%M:%SZ",
]
moments = st.datetimes(datetime(1900, 1, 2), datetime(2199, 12, 30))
offsets = st.integers(-14 * 60, 14 * 60).map(lambda m: timezone(timedelta(minutes=m)))


def texts(pattern: str, path: str) -> dict[str, str] | None:
    match = NamePattern(pattern).match(path)
    return match and match.texts


def backtracking(pieces: list[str]) -> re.Pattern[str]:
    """What the documentation of a pattern says, tried in every possible way."""
    means = {"*": "[^/]*", "**/": "(?:[^/]+/)*"}
    free = {f"{{{name}}}": "[^/]+" for name in FREE}
    regex = "".join({**means, **free}.get(piece, re.escape(piece)) for piece in pieces)
    anywhere = "(?:[^/]+/)*" if not any("/" in piece for piece in pieces) else ""
    return re.compile(anywhere + regex)


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("{tile}_{date}_{band}_10m.tif", "x/T32_20170918_B02_10m.tif",
         {"tile": "T32", "date": "20170918", "band": "B02"}),
        ("{tile}_{date}_{band}.tif", "637U_59R_1_3_20170918T101021_B02.tif",
         {"tile": "637U_59R_1_3", "date": "20170918T101021", "band": "B02"}),
        ("S2L2A/{tile}.tif", "S2L2A/433D_629L_3_1.tif", {"tile": "433D_629L_3_1"}),
        ("{label}/*.jpg", "Forest/Forest_1.jpg", {"label": "Forest"}),
        ("*_N{baseline}_*", "S2A_MSIL2A_20220101T1_N0400_R022.SAFE", {"baseline": "04.00"}),
        ("*_{baseline}_*", "S2A_N0301_R022.tif", {"baseline": "03.01"}),
        ("{tile}/{date}.tif", "LAHINCH/2017-09-18.tif", {"tile": "LAHINCH", "date": "2017-09-18"}),
        ("{date:%Y/%m/%d}/*/{band}.jp2", "2017/09/18/0/B02.jp2",
         {"date": "2017/09/18", "band": "B02"}),
        ("{tile}_{date:%d%m%Y}.tif", "a_18092017.tif", {"tile": "a", "date": "18092017"}),
        ("{split}/{tile}/{tile}_{band}.tif", "train/T_1/T_1_B2.tif",
         {"split": "train", "tile": "T_1", "band": "B2"}),
        ("**/{tile}/B.tif", "a/b/c/B.tif", {"tile": "c"}),
        ("a/**/{tile}.tif", "a/x.tif", {"tile": "x"}),
        ("{date}T*_{tile}.tif", "20170918T101_x.tif", {"date": "20170918", "tile": "x"}),
        ("{date}-*.tif", "20170918-20170921.tif", {"date": "20170918"}),
        ("*{date}.tif", "doy2017-261.tif", {"date": "2017-261"}),
    ],
)  # fmt: skip
def test_what_names_say(pattern, path, expected):
    assert texts(pattern, path) == expected


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        ("{tile}.tif", "a.TIF"),
        ("S2/{tile}.tif", "x/S2/a.tif"),
        ("{tile}/x.tif", "a/b/x.tif"),
        ("{tile}/{tile}.tif", "a/b.tif"),
        ("{tile}_{date}.tif", "a_2017261.tif"),
        ("{tile}_{date}.tif", "a_120170918.tif"),
        ("{tile}_{date}.tif", "a_autumn.tif"),
        ("{date}{tile}.tif", "2017-09-18.tif"),
        ("*_{baseline}.tif", "x_10400.tif"),
        ("{tile}.tif", "a.tif\n"),
        ("a?.tif", "ab.tif"),
        ("[ab].tif", "a.tif"),
    ],
)
def test_names_that_are_built_otherwise(pattern, path):
    assert texts(pattern, path) is None


@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=7), st.text("ab_-/", max_size=12))
def test_a_name_matches_exactly_if_some_way_to_read_it_does(pieces, path):
    placeholders = [piece for piece in pieces if piece.startswith("{")]
    assume(len(set(placeholders)) == len(placeholders))
    pattern = "".join(pieces)
    assume("***" not in pattern)
    assume(("*", "*") not in itertools.pairwise(pieces))
    assume("//" not in path)
    try:
        found = NamePattern(pattern).match(path)
    except ConfigError:
        assume(False)
    assert (found is not None) == (backtracking(pieces).fullmatch(path) is not None)


@given(st.data(), st.lists(st.sampled_from(PIECES[3:5] + PIECES[7:]), min_size=2, max_size=9))
def test_a_name_built_from_a_pattern_says_what_it_was_built_from(data, pieces):
    value = st.text(
        st.characters(exclude_characters="/_-", exclude_categories=["Cs"]), min_size=1, max_size=30
    )
    pattern = "_".join(piece for piece in pieces if piece.startswith("{")) + ".x"
    assume("{" in pattern)
    values = {name: data.draw(value) for name in FREE if f"{{{name}}}" in pattern}
    assert texts(pattern, pattern.format(**values)) == values


@given(moments, st.sampled_from(DATE_FORMS), st.text("ab_.", min_size=1, max_size=5))
def test_a_date_is_found_and_read_in_every_form(moment, form, tile):
    name = f"{tile}_{moment.strftime(form)}_B02.tif"
    found = texts("{tile}_{date}_{band}.tif", name)
    assert found is not None
    assert found["tile"] == tile
    assert parse_datetime(found["date"]) == as_read(moment, form)


@given(moments, st.permutations(["%Y", "%m", "%d"]), st.sampled_from(["", "_", ".", "("]))
def test_a_date_is_found_and_read_by_its_own_format(moment, directives, between):
    form = between.join(directives)
    pattern = NamePattern(f"{{tile}}-{{date:{form}}}.tif")
    found = pattern.match(f"x-{moment.strftime(form)}.tif")
    assert found is not None
    assert parse_datetime(found.texts["date"], pattern.date_format) == as_read(moment, form)


@given(moments, offsets, st.sampled_from(["seconds", "milliseconds", "microseconds"]))
def test_offsets_from_utc_are_taken_off(moment, zone, precision):
    text = moment.replace(tzinfo=zone).isoformat(timespec=precision)
    expected = moment.replace(tzinfo=zone, microsecond=0).astimezone(UTC)
    assert parse_datetime(text) == expected.strftime("%Y-%m-%dT%H:%M:%SZ")


def as_read(moment: datetime, form: str) -> str:
    time = "%H:%M:%S" if "%H" in form else "00:00:00"
    return moment.strftime(f"%Y-%m-%dT{time}Z")


@pytest.mark.parametrize(
    ("text", "date_format", "expected"),
    [
        ("2020-04-08T14:37:29.000000000", None, "2020-04-08T14:37:29Z"),
        ("2020-04-08 14:37", None, "2020-04-08T14:37:00Z"),
        ("2020-04-08T23:37:29-0330", None, "2020-04-09T03:07:29Z"),
        ("2020-04", None, "2020-04-01T00:00:00Z"),
        ("202004", None, "2020-04-01T00:00:00Z"),
        ("2020-366", None, "2020-12-31T00:00:00Z"),
        (" 20200408 ", None, "2020-04-08T00:00:00Z"),
        ("2020:04:08 14:37:29", "%Y:%m:%d %H:%M:%S", "2020-04-08T14:37:29Z"),
        ("A2020099", "A%Y%j", "2020-04-08T00:00:00Z"),
        ("8 Apr 2020", "%d %b %Y", "2020-04-08T00:00:00Z"),
    ],
)
def test_dates_as_text(text, date_format, expected):
    assert parse_datetime(text, date_format) == expected


@pytest.mark.parametrize(
    ("text", "date_format", "message"),
    [
        ("2017261", None, "'2017261' cannot be read .its form is not known.*; expected ISO 8601"),
        ("170918", None, "year 1709 is not in 1900"),
        ("20171399", None, "month must be in 1"),
        ("2017-366", None, "2017 has no day 366"),
        ("2017-000", None, "2017 has no day 000"),
        ("٢٠١٧-٠٩-١٨", None, "form is not known"),
        ("", None, "form is not known"),
        ("18.09.2017", None, "form is not known"),
        ("2017-09-18T10:10:10+24:00", None, "strictly between"),
        ("2017-09-18", "%d.%m.%Y", "expected %d.%m.%Y"),
        ("0001-01-01+0100", "%Y-%m-%d%z", "cannot be read"),
    ],
)
def test_dates_that_are_not_guessed(text, date_format, message):
    with pytest.raises(SceneError, match=message) as caught:
        parse_datetime(text, date_format)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{tiel}.tif", "{tiel} is not known; use {tile}, {date}, {band}, {baseline}, {label}, {split}"),
        ("{tile}{band}.tif", "nothing fixed separates {band} from what is before it"),
        ("*{tile}.tif", "nothing fixed separates"),
        ("a**b.tif", "nothing fixed separates"),
        ("{tile", "{ has no counterpart"),
        ("tile}", "} has no counterpart"),
        ("{tile:4}.tif", "{tile} has no format"),
        ("{date:%d.%m}.tif", "expected %Y or %y"),
        ("{date:%Y%q}.tif", "expected %Y or %y"),
        ("{date:%Y%Y}.tif", "each once"),
        ("{date:%Y%}.tif", "cannot be used"),
        ("{date:%Y}/{date:%Y%m%d}.tif", "{date:%Y} and {date:%Y%m%d} differ"),
        ("**/a/**/b.tif", "stands once"),
        ("a**/b.tif", "stands once"),
        ("/a.tif", "relative to the source"),
        ("", "relative to the source"),
    ],
)  # fmt: skip
def test_patterns_that_cannot_be_used(pattern, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        NamePattern(pattern)


def test_two_formats_for_one_date_contradict_each_other():
    assert NamePattern("{date}.tif", "%d%m%Y").match("18092017.tif")
    with pytest.raises(ConfigError, match="dates.format has no effect"):
        NamePattern("{date:%Y%m%d}.tif", "%d%m%Y")


@given(st.text(".^$+?()[]|\\#&~-<>=!:,a1 \n", min_size=1))
def test_the_text_of_a_pattern_is_literal(text):
    assert texts(text, text) == {}
    assert texts(text, f"folder/{text}") == {}
    assert texts(text, f"{text}a") is None


@pytest.mark.parametrize(
    "name", ["_" * 4000, "20170918_" * 450, "a_/" * 1300 + "_" * 100, "2017-09-18T10:10:10." + "0" * 4000]
)  # fmt: skip
@pytest.mark.parametrize(
    "pattern", ["*_" * 12 + "x", "{tile}_{date}_{band}_{label}_{split}_x", "**/*_*/{tile}_{tile}_x"]
)
def test_no_name_takes_exponentially_long(pattern, name):
    assert texts(pattern, name) is None


def test_names_may_hold_anything_but_a_slash():
    for tile in ("a\nb", "Zürich 東京", "x" * 240, "\udcff", "..."):
        assert texts("{tile}.tif", f"{tile}.tif") == {"tile": tile}


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("{tile}_{band}_10m", "T32_B02_10m", "T32_10m"),
        ("{band}_{tile}", "B02_T32", "T32"),
        ("{tile}_{band}", "T32_B02", "T32"),
        ("{tile}/{band}", "T32/B02", "T32"),
        ("{band}/{tile}", "B02/T32", "T32"),
        ("{band}/{tile}_{band}", "B02/T32_B02", "T32"),
        ("{tile}({band})", "T32(B02)", "T32()"),
        ("{band}", "B02", ""),
    ],
)
def test_cutting_the_band_out_of_a_path(pattern, path, expected):
    match = NamePattern(pattern).match(path)
    assert match is not None
    assert without_band(path, match.band_spans) == expected


@given(st.text("ab_-. ", min_size=1, max_size=6), st.text("ab_-. ", max_size=6))
def test_without_its_band_a_path_is_the_same_for_every_band(before, after):
    paths = [f"{before}{band}{after}" for band in ("B02", "B8A")]
    spans = ((len(before), len(before) + 3),)
    cut = {without_band(path, spans) for path in paths}
    assert len(cut) == 1
    assert len(cut.pop()) in (len(before + after), len(before + after) - 1)


@given(st.integers(0, 9999))
def test_baselines_have_one_form(number):
    digits = f"{number:04}"
    forms = [digits, f"N{digits}", f"{digits[:2]}.{digits[2:]}", f"N{digits[:2]}.{digits[2:]}"]
    assert {normal_baseline(form) for form in forms} == {forms[2]}


@given(st.text())
def test_printable_text_is_one_line_of_unicode(text):
    shown = printable(text)
    assert len(shown.splitlines()) <= 1
    assert shown.encode("utf-8").decode("utf-8") == shown
    if text.isprintable():
        assert shown == text


def test_control_characters_and_broken_unicode_are_escaped():
    assert printable("a\n\x1b[1m\udcff\u2028é") == "a\\n\\x1b[1m\\udcff\\u2028é"


def test_every_placeholder_is_known_to_a_pattern():
    pattern = NamePattern("_".join(f"{{{name}}}" for name in PLACEHOLDERS))
    assert pattern.names == set(PLACEHOLDERS)
