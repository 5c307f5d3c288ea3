import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ArchiveError, ConfigError, SceneError
from pipeline.locations import (
    SCHEMES,
    as_root,
    check_allowed,
    file_fingerprint,
    is_url,
    join,
    signed,
)
from pipeline.scenes import Access

ROOT = "https://host.example/data"
# urllib leaves out tabs and line ends, so that a name of dots and these is a name of dots.
names = st.text(
    st.characters(codec="utf-8", exclude_characters="/\\%?#@\0\t\r\n"), min_size=1, max_size=8
)
parts = st.lists(names.filter(lambda n: n.strip() not in ("", ".", "..")), min_size=1, max_size=4)


def allowed(href: str, *roots: str) -> bool:
    try:
        check_allowed(href, Access(roots))
    except SceneError:
        return False
    return True


@given(parts, st.sampled_from(SCHEMES))
def test_what_lies_below_a_root_is_allowed(path, scheme):
    root = f"{scheme}://host.example/data"
    assert allowed(join(root, "/".join(path)), root)
    assert allowed(join(root, "/".join(path)), "s3://other", as_root(root + "/"))


@given(parts)
def test_local_paths_below_a_root_are_allowed(tmp_path_factory, path):
    root = str(tmp_path_factory.getbasetemp())
    inside = [part.strip() for part in path]
    assert allowed(join(root, "/".join(inside)), as_root(root))


@given(parts, st.integers(1, 6))
def test_no_number_of_steps_up_leads_out_unseen(path, steps):
    up = "/".join([".."] * steps)
    for href in (f"{ROOT}/{up}/{'/'.join(path)}", f"/top/archive/{up}/{'/'.join(path)}"):
        root = ROOT if is_url(href) else "/top/archive"
        below = Path(os.path.normpath(href)).is_relative_to(root) and not is_url(href)
        assert allowed(href, root) == below


@pytest.mark.parametrize(
    "href",
    [
        "https://host.example/data-evil/a.tif",
        "https://host.example/dat",
        "https://host.example/",
        "https://host.example",
        "https://host.example/data/../secret.tif",
        "https://host.example/data/%2e%2e/secret.tif",
        "https://host.example/data/%2E./secret.tif",
        "https://host.example/data\\..\\secret.tif",
        "https://host.example/data/.\t./secret.tif",
        "https://host.example.evil/data/a.tif",
        "https://host.example@evil.example/data/a.tif",
        "https://user:key@host.example/data/a.tif",
        "https://evil.example/?https://host.example/data/a.tif",
        "https://evil.example/https://host.example/data/a.tif",
        "https://host.example/data/..%2fsecret",
        "https://host.example/data/%252e%252e/secret",
        "https://[host/data/a.tif",
        "https://h\u2100.example/data/a.tif",
        "https://evil.example#@host.example/data/a.tif",
        "https://host.example:8443/data/a.tif",
        "http://host.example/data/a.tif",
        "s3://host.example/data/a.tif",
        "file:///data/a.tif",
        "/vsicurl/https://host.example/data/a.tif",
        "/vsizip//data/a.zip/a.tif",
        "//host.example/data/a.tif",
        "/data/a.tif",
        "data/a.tif",
        "",
    ],
)
def test_urls_that_only_look_as_if_they_were_below_the_root(href):
    assert not allowed(href, ROOT)


@pytest.mark.parametrize(
    "href",
    [
        "https://host.example/data",
        "https://HOST.example/data/a.tif",
        "HTTPS://host.example/data/a.tif",
        "https://host.example/data/a.tif?sig=x/../y&e=1",
        "https://host.example/data/a..b/c.tif",
    ],
)
def test_urls_below_the_root(href):
    assert allowed(href, ROOT)


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """An archive from which links lead to a file and a folder beside it."""
    root, outside = tmp_path / "archive", tmp_path / "elsewhere"
    root.mkdir()
    outside.mkdir()
    for file in (tmp_path / "secret.tif", outside / "a.tif"):
        file.touch()
    (root / "link.tif").symlink_to(tmp_path / "secret.tif")
    (root / "folder").symlink_to(outside)
    return root


@pytest.mark.parametrize(
    "href", ["../secret.tif", "link.tif", "folder/a.tif", "folder/../secret.tif", "//etc/passwd"]
)
def test_local_files_outside_the_root(linked, href):
    with pytest.raises(SceneError, match="points to /.*, outside .*archive; if you trust it, add"):
        check_allowed(join(str(linked), href), Access((as_root(str(linked)),)))


@pytest.mark.parametrize("href", ["../secret.tif", "link.tif", "folder/a.tif"])
def test_local_files_of_a_further_root(linked, href):
    assert allowed(join(str(linked), href), as_root(str(linked)), as_root(str(linked.parent)))


def test_a_neighbour_whose_name_begins_alike_is_outside(tmp_path):
    for name in ("data", "data-evil"):
        (tmp_path / name).mkdir()
    assert not allowed(str(tmp_path / "data-evil" / "a.tif"), as_root(str(tmp_path / "data")))


def test_an_archive_that_is_a_link_is_its_target(tmp_path):
    (tmp_path / "v1").mkdir()
    (tmp_path / "current").symlink_to(tmp_path / "v1")
    assert as_root(str(tmp_path / "current")) == str((tmp_path / "v1").resolve())
    assert allowed(str(tmp_path / "current" / "a.tif"), as_root(str(tmp_path / "current")))


@pytest.mark.parametrize(
    "location", ["ftp://host/a", "memory://a", "file:///a", "zip://a", "stac+https://host/v1"]
)
def test_unknown_schemes_are_named(location):
    assert not is_url(location)
    with pytest.raises(
        ConfigError, match="is not supported; expected a local path or one of https://"
    ):
        as_root(location)


@pytest.mark.parametrize(
    ("base", "relative", "expected"),
    [
        ("/a", "b/c.tif", "/a/b/c.tif"),
        ("/a", "/b/c.tif", "/b/c.tif"),
        ("/a", "s3://b/c.tif", "s3://b/c.tif"),
        ("https://h/a", "b/c.tif", "https://h/a/b/c.tif"),
        ("https://h/a/", "./b.tif", "https://h/a/b.tif"),
        ("https://h/a?key=1", "b.tif", "https://h/a/b.tif"),
        ("https://h/a/b", "../c.tif", "https://h/a/c.tif"),
        ("https://h/a", "../../c.tif", "https://h/c.tif"),
        ("s3://bucket", "c.tif", "s3://bucket/c.tif"),
    ],
)
def test_joining(base, relative, expected):
    assert join(base, relative) == expected


def test_fingerprints_tell_a_rewritten_file(tmp_path):
    file = tmp_path / "a.tif"
    file.write_bytes(b"ab")
    first = file_fingerprint(str(file))
    os.utime(file, ns=(1, 1))
    second = file_fingerprint(str(file))
    file.write_bytes(b"abc")
    assert len({first, second, file_fingerprint(str(file))}) == 3
    with pytest.raises(FileNotFoundError):
        file_fingerprint(str(tmp_path / "none.tif"))


def test_only_urls_are_signed():
    access = Access((ROOT,), sign="posixpath:normpath")
    assert signed("/a/../b.tif", access) == "/a/../b.tif"
    assert signed("https://host.example/a//b", access) == "https:/host.example/a/b"
    assert signed("https://host.example/a//b", Access((ROOT,))) == "https://host.example/a//b"


@pytest.mark.parametrize("function", ["no.such.module:f", "posixpath:nothing", "posixpath", ":f"])
def test_a_signing_function_that_is_not_there(function):
    with pytest.raises(
        ArchiveError, match="run.sign .* cannot be used .*; expected package.module:f"
    ):
        signed("https://host.example/a", Access((ROOT,), sign=function))
