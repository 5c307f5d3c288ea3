"""The errors a user can cause, in one small tree.

Every message says what was given, what is expected and what to do, in one line. The exit codes are
those of the command line (`docs/command-line.md`).
"""

EXIT_OK = 0
EXIT_USAGE = 2
EXIT_QUARANTINED = 3
EXIT_INTEGRITY = 4
EXIT_LOCKED = 5
# As shells give for Ctrl-C and for SIGTERM.
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class AptileError(ValueError):
    """Anything the user can mend: its text is the whole message, `exit_code` ends the command."""

    exit_code = EXIT_USAGE


class ConfigError(AptileError):
    """A configuration file, key or value that cannot be used."""


class ArchiveError(AptileError):
    """A source that holds no usable scene, or scenes that do not belong together."""


class SceneError(AptileError):
    """One scene that cannot be read; the job quarantines it and goes on."""


class StoreError(AptileError):
    """A store path that cannot be used for what was asked."""


class NoSpaceError(StoreError):
    """A disk or quota that is full; what was done stays done."""


class IntegrityError(StoreError):
    """A store whose contents contradict each other: lost, torn, swapped or altered objects."""

    exit_code = EXIT_INTEGRITY


class LockedError(StoreError):
    """Another process is writing the store."""

    exit_code = EXIT_LOCKED
