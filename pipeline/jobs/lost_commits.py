"""Earlier commits that were damaged: what they said follows from the commit after them, or is unknown.

The sha256 that the next commit gives of its parent tells whether a guess is right.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import AptileError
from pipeline.jobs.outcome import summary_of
from pipeline.storage.chain import Chain
from pipeline.storage.commit import APPEND, PREPROCESS, REPARTITION, Commit, commit_name, named
from pipeline.storage.header import grown, layouts_of
from pipeline.storage.history import read_history
from pipeline.storage.layout import metadata_objects
from pipeline.storage.objects import Objects, entry


def derived_commits(objects: Objects, chain: Chain) -> dict[str, bytes]:
    """The right bytes of damaged earlier commits by name, as far as they can be told."""
    found = {}
    for number, after in chain.commits.items():
        name = commit_name(number - 1)
        if name in chain.damaged and name not in chain.restored:
            content = _derived(objects, chain, after)
            if content is not None:
                found[name] = content
    return found


def _derived(objects: Objects, chain: Chain, after: Commit) -> bytes | None:
    """The bytes of the commit before `after`, if its own parent is known."""
    number, parent = after.number - 1, None
    if number > 1:
        if number - 1 not in chain.commits:
            return None
        parent = hashlib.sha256(chain.commits[number - 1].encode()).hexdigest()
    try:
        for guess in _guesses(objects, after):
            for kind in (PREPROCESS, APPEND, REPARTITION):
                content = replace(guess, number=number, parent=parent, kind=kind).encode()
                if hashlib.sha256(content).hexdigest() == after.parent:
                    return content
    except (AptileError, OSError, ValueError, KeyError):
        pass  # what it would follow from is damaged too
    return None


def _guesses(objects: Objects, after: Commit) -> Iterator[Commit]:
    if after.kind == APPEND:
        yield _before_append(objects, after)
    for partitions in _fewer_partitions(after.partitions) if after.kind == REPARTITION else ():
        yield replace(after, partitions=partitions, metadata=_metadata(after.header, partitions))


def _before_append(objects: Objects, after: Commit) -> Commit:
    batches = after.batches[:-1]
    header = grown(after.header, sum(batch.num_shards for batch in batches))
    path = after.manifest["path"].replace(
        f"{after.batches[-1].number:06d}", f"{batches[-1].number:06d}"
    )
    content = objects.read(path)
    before = replace(after, header=header, batches=batches, manifest=named(path, content))
    splits = pq.read_table(pa.BufferReader(content), columns=["split"])["split"].to_pylist()
    return replace(
        before,
        summary=summary_of(read_history(objects, before), splits, header["config"]),
        metadata=_metadata(header, after.partitions),
    )


def _fewer_partitions(partitions: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What there was before one partition was made, or was made of the last batches too."""
    for modality, made in partitions.items():
        for name, what in made.items():
            for kept in range(len(what["ledgers"])):
                own = {**made, name: {**what, "ledgers": what["ledgers"][:kept]}}
                if kept == 0:
                    del own[name]
                fewer = {**partitions, modality: own}
                if not own:
                    del fewer[modality]
                yield fewer


def _metadata(header: dict[str, Any], partitions: dict[str, Any]) -> dict[str, dict[str, Any]]:
    made = metadata_objects(header, layouts_of(header).values(), partitions)
    return {name: entry(content) for name, content in made.items()}
