# SPDX-License-Identifier: LGPL-2.1-or-later
"""The exceptions of secretd, and the QMP error classes they stand for.

Handlers raise these; only monitor turns them into replies. A ``desc`` goes to the client that
caused it word for word, so it never holds anything the schema marks sensitive.

    SecretdError
     ├── CommandError              class GenericError: the words of the reply
     │    ├── CommandNotFound      class CommandNotFound
     │    ├── DeviceNotFound       class DeviceNotFound
     │    ├── AccessDenied         class GenericError: access.check() said no
     │    ├── LimitReached         class GenericError: names the limit and its value
     │    └── LockedMemoryExhausted   class GenericError: names the limit and how to raise it
     ├── PeerUnknown               the kernel does not say in full who has connected
     ├── SourceError               why a file, descriptor or key cannot be read
     ├── StateError                what an earlier process left cannot be gone on with
     ├── MemoryLockError           memory cannot be locked and --memory-lock=require was given
     └── UsageError                the command line cannot be carried out; exit status 1
"""


class SecretdError(Exception):
    """Root of all exceptions that secretd raises on purpose."""


class CommandError(SecretdError):
    """A command failed. ``desc`` is the text of the QMP error (QMP spec, section "Response")."""

    error_class = "GenericError"

    def __init__(self, desc: str) -> None:
        super().__init__(desc)
        self.desc = desc


class CommandNotFound(CommandError):
    """No such command in the table this connection looks in."""

    error_class = "CommandNotFound"


class DeviceNotFound(CommandError):
    """A QOM path or type name that leads nowhere."""

    error_class = "DeviceNotFound"


class AccessDenied(CommandError):
    """The peer may not do this; says nothing of whether the object exists."""


class LimitReached(CommandError):
    """There is too much of something.

    ``limit``: which of the limits, as query-secret-stats calls it.
    """

    def __init__(self, limit: str, desc: str) -> None:
        super().__init__(desc)
        self.limit = limit


class LockedMemoryExhausted(CommandError):
    """No locked memory is left within RLIMIT_MEMLOCK."""


class PeerUnknown(SecretdError):
    """The kernel does not identify the peer completely; the text is the reason. ``uid``: the
    peer's, as far as it is known, else -1.
    """

    def __init__(self, words: str, uid: int = -1) -> None:
        super().__init__(words)
        self.uid = uid


class SourceError(SecretdError):
    """Why what an object's content comes from cannot be read; each type has its words around it.

    ``limit``: the limit that was reached, as query-secret-stats calls it, None if it was none.
    """

    def __init__(self, words: str, limit: str | None = None) -> None:
        super().__init__(words)
        self.limit = limit


class StateError(SecretdError):
    """The arena or journal that an earlier process left cannot be gone on with; the text is the
    reason.
    """


class MemoryLockError(SecretdError):
    """Secrets cannot be kept in locked memory, and the administrator requires it."""


class UsageError(SecretdError):
    """What the command line asks for cannot be done; the text is for the person who typed it."""
