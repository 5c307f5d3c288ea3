import csv
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ArchiveError
from pipeline.scenes import Access
from pipeline.sources.tables import read_table, scene_key

COLUMNS = ("scene", "label")
# What a cell can hold once the spaces around it are gone; no scene is twice the same but for its suffix.
cells = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20).map(
    str.strip
)
scenes = cells.filter(lambda cell: cell and scene_key(cell) == cell)


def read(folder: Path, content: str | bytes, columns=COLUMNS) -> dict[str, str]:
    file = folder / "table.csv"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_table(str(file), columns, Access((str(folder.resolve()),)))


@given(st.dictionaries(scenes, cells.filter(bool), max_size=5), st.sampled_from(["\n", "\r\n"]))
def test_a_table_comes_back_as_it_was_written(tmp_path, table, line_end):
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator=line_end, quoting=csv.QUOTE_ALL)
    writer.writerows([COLUMNS, *table.items()])
    assert read(tmp_path, stream.getvalue()) == table


@pytest.mark.parametrize(
    "content",
    [
        "scene,label\na/b.tif,Forest\nc,River\n",
        "\ufeffscene,label\na/b,Forest\nc.TIFF,River\n",
        "label;x,scene , label \n1,./a/b.jp2, Forest \n\n2,c,River\n",
        'scene,label\r\n"a/b","Forest"\r\nc,River\r\n',
        "scene,label\na/b,Forest\na/b.tif,Forest\nc,River",
    ],
    ids=["plain", "byte order mark", "further columns", "quoted", "twice the same"],
)
def test_scenes_come_with_or_without_suffix(tmp_path, content):
    assert read(tmp_path, content) == {"a/b": "Forest", "c": "River"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("scene,label\na,x\na.tif,y\n", "line 3: label of 'a.tif' is 'y', but further up 'x'"),
        ("scene,class\na,x\n", "column 'label' is missing; it has 'scene', 'class', expected"),
        ("scene;label\na;x\n", "column 'scene' is missing; it has 'scene;label'"),
        ("scene,label,label\na,x,y\n", "column 'label' is twice"),
        ("", "column 'scene' is missing; it has none"),
        ("scene,label\n\na\n", "line 3: label is empty; fill it or leave out the line"),
        ("scene,label\n,x\n", "line 2: scene is empty"),
        ('scene,label\n"a"b,x\n', "not a CSV file"),
        ("scene,label\n" + "a" * 200_000 + ",x\n", "not a CSV file: field larger"),
        (b"scene,label\n\xff,x\n", "not UTF-8"),
        ("scene,label\na,x\n".encode("utf-16"), "not UTF-8"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, content, message):
    with pytest.raises(ArchiveError, match=message) as caught:
        read(tmp_path, content)
    assert "table.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_table_lies_below_the_roots(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.csv").write_text("scene,label\na,x\n")
    access = Access((str((tmp_path / "in").resolve()),))
    (tmp_path / "in" / "link.csv").symlink_to(tmp_path / "secret.csv")
    for file in (tmp_path / "secret.csv", tmp_path / "in/../secret.csv", tmp_path / "in/link.csv"):
        with pytest.raises(ArchiveError, match="outside .*; if you trust it, add it to run.allow"):
            read_table(str(file), COLUMNS, access)


def test_a_table_that_is_not_there(tmp_path):
    with pytest.raises(ArchiveError, match="none.csv: cannot be read: No such file"):
        read_table(str(tmp_path / "none.csv"), COLUMNS, Access((str(tmp_path),)))


@pytest.mark.parametrize(
    ("given_name", "key"),
    [("a.tif", "a"), ("a.2017.TIFF", "a.2017"), ("a.2017", "a.2017"), ("./a/b", "a/b"), ("a.csv", "a.csv")],
)  # fmt: skip
def test_the_key_of_a_scene(given_name, key):
    assert scene_key(given_name) == key
