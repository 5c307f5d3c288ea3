"""What every process that runs tasks has in common: one thread each."""

import contextlib
import faulthandler
import os
import sys
from collections.abc import Iterator

# Parallelism comes from processes, so nothing inside one starts threads of its own. GDAL's threads and
# cache are limited where rasters are opened.
ENVIRONMENT = {
    "BLOSC_NTHREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
}
# Dask has workers return freed memory at once, which glibc then does for every window and packed frame: a
# third of a worker's time went into clearing pages. Smaller pieces than this stay in the process. It counts
# only where it is set before a process starts.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(64 * 2**20)}


def be_one_of_many() -> None:
    """Set what the environment does not say yet, where the process was started by somebody else."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if "numba" in sys.modules:
        sys.modules["numba"].set_num_threads(1)


@contextlib.contextmanager
def dying_after(seconds: float | None) -> Iterator[None]:
    """End the whole process if the block takes longer, even where C code holds the interpreter."""
    if seconds is None:
        yield
        return
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123 (a traceback of a hung reader helps nobody)
        faulthandler.dump_traceback_later(seconds, exit=True, file=nowhere)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
