"""Stores in object stores (s3://, gs://, az://): whole objects, replaced on condition.

`obstore` signs, retries and checks what it sends; credentials and endpoints come from the variables of the
environment that the providers' own tools use.
"""

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import numpy as np
import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError, PreconditionError
from obstore.store import from_url
from zarr import Array
from zarr.core.array import AsyncArray
from zarr.core.metadata import ArrayV3Metadata
from zarr.storage import ObjectStore, StorePath

from pipeline.errors import LockedError, StoreError
from pipeline.storage.layout import ArraySpec, array_metadata
from pipeline.storage.objects import check_name, entry

# A request is tried so often, each time after a longer wait, before it counts as failed.
MAX_RETRIES = 8
RETRY_TIMEOUT = timedelta(seconds=120)
_READERS = 8


class BucketObjects:
    """Objects below a prefix of a bucket."""

    def __init__(self, url: str) -> None:
        self.location = url.rstrip("/")
        self.store = from_url(
            self.location,
            retry_config={"max_retries": MAX_RETRIES, "retry_timeout": RETRY_TIMEOUT},
        )

    def read(self, name: str) -> bytes:
        try:
            return bytes(obstore.get(self.store, check_name(self.location, name)).bytes())
        except (NotFoundError, FileNotFoundError):
            raise FileNotFoundError(f"{self.location}/{name}") from None
        except BaseError as error:
            raise self._failed(f"cannot read {name}", error) from None

    def size(self, name: str) -> int | None:
        head = self._head(name)
        return None if head is None else int(head["size"])

    def digest(self, name: str) -> dict[str, Any] | None:
        found, length = hashlib.sha256(), 0
        try:
            for piece in obstore.get(self.store, check_name(self.location, name)):
                found.update(piece)
                length += len(piece)
        except (NotFoundError, FileNotFoundError):
            return None
        except BaseError as error:
            raise self._failed(f"cannot read {name}", error) from None
        return {"bytes": length, "sha256": found.hexdigest()}

    def modified(self, name: str) -> float:
        head = self._head(name)
        if head is None:
            raise FileNotFoundError(f"{self.location}/{name}")
        return float(head["last_modified"].timestamp())

    def names(self, below: str = "") -> Iterator[str]:
        try:
            for page in obstore.list(self.store, prefix=below or None):
                yield from (found["path"] for found in page)
        except BaseError as error:
            raise self._failed(f"cannot list {below}", error) from None

    def write(self, name: str, content: bytes | memoryview) -> dict[str, Any]:
        try:
            obstore.put(self.store, name, bytes(content))
        except BaseError as error:
            raise self._failed(f"cannot write {len(content)} bytes to {name}", error) from None
        return entry(content)

    def swap(self, name: str, content: bytes, seen: bytes | None) -> None:
        changed = LockedError(
            f"{self.location}/{name} was written by another process meanwhile; run the same command again"
        )
        try:
            if seen is None:
                obstore.put(self.store, name, content, mode="create")
                return
            found = obstore.get(self.store, name)
            tag = found.meta["e_tag"]
            if bytes(found.bytes()) != seen or tag is None:
                raise changed
            obstore.put(self.store, name, content, mode={"e_tag": tag})
        except (AlreadyExistsError, PreconditionError, NotFoundError, FileNotFoundError):
            # A request that was answered too late is sent again, and then meets its own first copy.
            if self._holds(name, content):
                return
            raise changed from None
        except BaseError as error:
            raise self._failed(f"cannot replace {name}", error) from None

    def append(self, log: str, rows: bytes) -> None:
        # Named by content: adding the same rows twice is adding them once.
        self.write(f"{log}.rows/{hashlib.sha256(rows).hexdigest()[:32]}", rows)

    def lines(self, log: str) -> bytes:
        try:
            head = self.read(log)
        except FileNotFoundError:
            return b""
        with ThreadPoolExecutor(_READERS) as pool:
            return head + b"".join(pool.map(self.read, sorted(self.names(f"{log}.rows"))))

    def remove(self, names: Iterable[str]) -> None:
        names = list(names)
        if not names:
            return
        try:
            obstore.delete(self.store, names)
        except (NotFoundError, FileNotFoundError):
            return
        except BaseError as error:
            raise self._failed(f"cannot remove {names[0]}", error) from None

    def sweep(self) -> None:
        """Nothing to do: an object that was not written whole is not there."""

    def clear(self) -> None:
        self.remove(self.names())

    def _head(self, name: str) -> Any:
        try:
            return obstore.head(self.store, check_name(self.location, name))
        except (NotFoundError, FileNotFoundError):
            return None
        except BaseError as error:
            raise self._failed(f"cannot look at {name}", error) from None

    def _holds(self, name: str, content: bytes) -> bool:
        try:
            return self.read(name) == content
        except FileNotFoundError:
            return False

    def _failed(self, what: str, error: BaseError) -> StoreError:
        reason = " ".join(str(error).split("\n\nDebug source")[0].split())
        return StoreError(
            f"{self.location}: {what}: {reason:.300}; check address, credentials and connection, then run "
            "the same command again"
        )


class BucketArray:
    """One array, read through zarr by ranges."""

    def __init__(self, objects: BucketObjects, name: str, spec: ArraySpec, codec: str) -> None:
        path = StorePath(ObjectStore(objects.store, read_only=True), name)
        metadata = ArrayV3Metadata.from_dict(array_metadata(spec, codec))
        self._array = Array(AsyncArray(metadata=metadata, store_path=path))
        self._pool = ThreadPoolExecutor(_READERS)

    def read(self, first: slice | np.ndarray) -> "Future[np.ndarray]":
        return self._pool.submit(self._read, first)

    def _read(self, first: slice | np.ndarray) -> np.ndarray:
        found = self._array[first] if isinstance(first, slice) else self._array.oindex[first]
        return np.asarray(found)
