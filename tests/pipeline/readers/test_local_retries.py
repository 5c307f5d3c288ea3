"""Local files on a disk that fails for a moment: a small library before the system's makes it so."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cubes import cube, save
from support import save_scene, textured

# Every n-th read of files below a folder fails; from the last one on for ever, if so told.
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static int count, injected;

static int fails(int fd) {
    char link[64], path[4096];
    const char *below = getenv("FAULTY_FOLDER"), *every = getenv("FAULTY_EVERY");
    const char *log = getenv("FAULTY_LOG");
    if (!below) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    if (strncmp(path, below, strlen(below)) || ++count % atoi(every)) return 0;
    injected++;
    FILE *file = fopen(log, "a");
    fprintf(file, "x");
    fclose(file);
    errno = atoi(getenv("FAULTY_ERRNO"));
    return 1;
}

#define REAL(name, type) static type real; if (!real) real = (type)dlsym(RTLD_NEXT, name)
typedef ssize_t (*read_t)(int, void *, size_t);
typedef ssize_t (*pread_t)(int, void *, size_t, off_t);
typedef size_t (*fread_t)(void *, size_t, size_t, FILE *);

ssize_t read(int fd, void *to, size_t n) { REAL("read", read_t); return fails(fd) ? -1 : real(fd, to, n); }
ssize_t pread(int fd, void *to, size_t n, off_t at) {
    REAL("pread", pread_t); return fails(fd) ? -1 : real(fd, to, n, at);
}
ssize_t pread64(int fd, void *to, size_t n, off_t at) {
    REAL("pread64", pread_t); return fails(fd) ? -1 : real(fd, to, n, at);
}
size_t fread(void *to, size_t size, size_t n, FILE *file) {
    REAL("fread", fread_t); return fails(fileno(file)) ? 0 : real(to, size, n, file);
}
"""
READ = """
import sys
import numpy as np
from pipeline.errors import AptileError
from pipeline.scenes import Access, Asset, Plane, Retries, Window
from pipeline.settings.modality import ModalityConfig

path, out = sys.argv[1:]
access = Access((path.rpartition("/")[0],), retries=Retries(4, 0.001, 2, 0.01))
try:
    if path.endswith(".tif"):
        from pipeline.readers.rasters import open_raster_asset, read_header
        header = read_header(path, access)
        planes = tuple(Plane(str(n), n) for n in range(header.num_bands))
        asset = Asset(path, "raster", header.grid, header.dtype, planes, header.block_shape, "")
        with open_raster_asset(asset, access) as reader:
            found = reader.read(Window(0, 0, header.grid.height, header.grid.width))
    else:
        from pipeline.readers.arrays import open_array_asset
        from pipeline.sources.cube import list_cube
        scene = list_cube(path, path, ModalityConfig(bands=("B02", "B03")), access).scenes[0]
        with open_array_asset(scene.assets[0], access) as reader:
            found = reader.read(Window(0, 0, 20, 30))
    np.save(out, found)
except AptileError as error:
    sys.exit(str(error))
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory) -> Path:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(SHIM)
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", "shim.so", "shim.c", "-ldl"]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "shim.so"


def read(path: Path, shim: Path, error: str, every: int) -> tuple[np.ndarray | str, int]:
    """What comes of reading a file whose reads fail now and then, and how many did."""
    out, log = path.parent.parent / "out.npy", path.parent.parent / "log"
    log.write_text("")
    environment = os.environ | {
        "LD_PRELOAD": str(shim),
        "FAULTY_FOLDER": str(path.parent),
        "FAULTY_EVERY": str(every),
        "FAULTY_ERRNO": error,
        "FAULTY_LOG": str(log),
    }
    command = [sys.executable, "-W", "ignore", "-c", READ, str(path), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    found = np.load(out) if done.returncode == 0 else done.stderr.strip()
    return found, len(log.read_text())


PIXELS = textured((3, 200, 300), seed=5)
EIO, ESTALE = "5", "116"


@pytest.mark.parametrize("name", ["tiles.tif", "raw.tif", "cube.nc", "cube.zarr"])
@pytest.mark.parametrize(
    ("error", "every"),
    [(EIO, 2), *(pytest.param(*case, marks=pytest.mark.full) for case in ((EIO, 5), (ESTALE, 3)))],
)
def test_reads_that_fail_for_a_moment_change_no_number(tmp_path, shim, name, error, every):
    path, expected = tmp_path / "scenes" / name, PIXELS
    if name.endswith(".tif"):
        tiled = {"tiled": True, "blockxsize": 64, "blockysize": 64, "compress": "deflate"}
        save_scene(path, PIXELS, **(tiled if name == "tiles.tif" else {}))
    else:
        path.parent.mkdir()
        dataset = cube()
        save(dataset, path)
        expected = np.stack([dataset[band].values[0] for band in ("B02", "B03")])
    found, injected = read(path, shim, error, every)
    print(f"{name}: {injected} failures of errno {error} injected, every {every}th read")
    assert injected > 0
    assert isinstance(found, np.ndarray), found
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", ["tiles.tif", "cube.zarr"])
def test_a_disk_that_never_answers_is_an_error_and_no_zeros(tmp_path, shim, name):
    path = tmp_path / "scenes" / name
    if name.endswith(".tif"):
        save_scene(path, PIXELS)
    else:
        path.parent.mkdir()
        save(cube(), path)
    found, injected = read(path, shim, EIO, 1)
    assert injected >= 4
    assert "cannot be read: tried 4 times" in found
    assert found.endswith("at last: Input/output error")
