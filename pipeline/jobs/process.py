"""What every process that runs tasks has in common: one thread each, and a limit on its caches."""

import contextlib
import faulthandler
import os
import sys
from collections.abc import Iterator

# Parallelism comes from processes, so nothing inside one starts threads of its own. GDAL would take 5 % of
# the machine's memory for blocks in every process; tasks read few large windows and need little of it.
ENVIRONMENT = {
    "GDAL_CACHEMAX": "256",
    "GDAL_NUM_THREADS": "1",
    "BLOSC_NTHREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
}


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
