"""The commits of a store as a chain, as far as they can be read, and what the damaged ones were."""

import hashlib
import re
from dataclasses import dataclass, field

from pipeline.storage.commit import COMMIT, COMMITS, Commit, commit_name, decode
from pipeline.storage.objects import Objects

_NUMBERED = re.compile(rf"{COMMITS}/(\d{{6,9}})\.json")

# A forged number must not keep anybody busy for ever.
_MOST = 100_000


@dataclass(frozen=True)
class Chain:
    """The intact commits by number, the newest that readers see, and what is wrong with the others.

    `damaged` says by object name what is wrong, `restored` has the right bytes of those whose bytes are
    known from another object. `hidden` are commits beyond the newest: written, but not made visible.
    """

    newest: Commit | None
    commits: dict[int, Commit] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)
    restored: dict[str, bytes] = field(default_factory=dict)
    hidden: tuple[str, ...] = ()

    @property
    def intact(self) -> list[Commit]:
        """Oldest first."""
        return [self.commits[number] for number in sorted(self.commits)]


def read_chain(objects: Objects) -> Chain:
    """Read every commit; nothing is raised for damage. Without any trace of one, `newest` is None."""
    damaged: dict[str, str] = {}
    contents = {n: objects.read(commit_name(n)) for n in _numbers(objects)}
    commits: dict[int, Commit] = {}
    for number, content in contents.items():
        commit = _decoded(content, commit_name(number), damaged)
        if commit is not None and commit.number == number:
            commits[number] = commit
        elif commit is not None:
            damaged[commit_name(number)] = f"is commit {commit.number}"
    head = _content(objects, COMMIT)
    if head is None and not contents:
        return Chain(None)
    newest = None if head is None else _decoded(head, COMMIT, damaged)
    if head is None:
        damaged[COMMIT] = "is missing"
    if newest is None:
        newest = commits[max(commits)] if commits else None
        if newest is None:
            return Chain(None, damaged=damaged)
        head = newest.encode()
    assert head is not None
    return _checked(newest, head, contents, commits, damaged)


def _checked(
    newest: Commit,
    head: bytes,
    contents: dict[int, bytes],
    commits: dict[int, Commit],
    damaged: dict[str, str],
) -> Chain:
    """The chain below the newest commit, whose bytes are `head`."""
    restored = {COMMIT: head} if COMMIT in damaged else {}
    last = newest.number
    hidden = tuple(commit_name(number) for number in sorted(contents) if number > last)
    for number in [number for number in commits if number > last]:
        del commits[number]
    for name in hidden:
        damaged.pop(name, None)
    if contents.get(last) != head:
        name = commit_name(last)
        damaged[name] = damaged.get(name) or (
            "is missing" if last not in contents else f"differs from {COMMIT}"
        )
        restored[name] = head
    commits[last] = newest
    _check_parents(last, commits, contents, damaged)
    return Chain(newest, dict(sorted(commits.items())), damaged, restored, hidden)


def _check_parents(
    last: int, commits: dict[int, Commit], contents: dict[int, bytes], damaged: dict[str, str]
) -> None:
    """Every commit but the first names the one before it by its sha256."""
    for number in range(last - 1, max(0, last - 1 - _MOST), -1):
        name = commit_name(number)
        after = commits.get(number + 1)
        if number not in contents:
            damaged[name] = "is missing"
        elif after is not None and number in commits and not _follows(after, contents[number]):
            damaged[name] = f"is not what commit {number + 1} follows"
            del commits[number]


def _follows(after: Commit, content: bytes) -> bool:
    return hashlib.sha256(content).hexdigest() == after.parent


def _decoded(content: bytes, name: str, damaged: dict[str, str]) -> Commit | None:
    try:
        return decode(content)
    except ValueError as error:
        damaged[name] = f"is not a commit ({error})"
        return None


def _numbers(objects: Objects) -> list[int]:
    found = (_NUMBERED.fullmatch(name) for name in objects.names(COMMITS))
    return sorted(
        int(match[1]) for match in found if match and commit_name(int(match[1])) == match[0]
    )


def _content(objects: Objects, name: str) -> bytes | None:
    try:
        return objects.read(name)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
