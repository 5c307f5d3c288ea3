"""Addresses that nobody outside may name are not connected to, however they are written."""

import pytest

from faulty_server import QUICK, listener
from pipeline.errors import SceneError
from pipeline.fetch.addresses import addresses_of
from pipeline.fetch.http import Question, ask
from pipeline.readers.rasters import read_header
from pipeline.scenes import Access

PRIVATE = (
    "127.0.0.1", "0.0.0.0",  # noqa: S104
    "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
    "[::1]", "[::]", "[fe80::1]", "[fc00::1]", "[::ffff:127.0.0.1]", "[::ffff:a9fe:a9fe]",
    "[64:ff9b::a9fe:a9fe]", "[2002:7f00:1::]", "224.0.0.1", "255.255.255.255",
    "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "0x7f.1", "2852039166", "localhost",
)  # fmt: skip


@pytest.mark.parametrize("host", PRIVATE)
def test_private_addresses_are_not_connected_to(host):
    """Not even below a root, where the host is no plain address: whoever wrote it did not see one."""
    with listener() as (address, came):
        port = address.rpartition(":")[2]
        url = f"http://{host}:{port}/a.tif"
        access = Access(("https://data.example", f"http://{host}/"), retries=QUICK)
        with pytest.raises(SceneError, match="outside"):
            read_header(url, access)
        elsewhere = Access(("https://data.example",), retries=QUICK)
        with pytest.raises(SceneError, match="a private address, which is not connected to"):
            ask(Question(url), elsewhere)
        assert came == []


@pytest.mark.parametrize("host", ["2130706433", "0x7f000001", "0177.0.0.1", "127.1"])
def test_only_an_address_written_out_names_itself(host):
    with pytest.raises(SceneError, match="a private address"):
        addresses_of(host, 80, Access((f"http://{host}",)))
