# SPDX-License-Identifier: LGPL-2.1-or-later
"""The exceptions of secretd, and the QMP error classes that they stand for.

Handlers raise them. monitor.monitor turns them into replies; session and server report why they
close a connection. The client that caused an error receives
its ``desc`` word for word, so a ``desc`` never holds a value that the schema marks sensitive.

    SecretdError
     ├── CommandError              class GenericError: the words of the reply
     │    ├── CommandNotFound      class CommandNotFound
     │    ├── DeviceNotFound       class DeviceNotFound
     │    ├── AccessDenied         class GenericError: the peer may not do this
     │    ├── LimitReached         class GenericError: names the limit and its value
     │    └── LockedMemoryExhausted   class GenericError: names the limit
     ├── PeerUnknown               the kernel does not identify the peer completely
     ├── SourceError               why a file, descriptor or key cannot be read
     ├── StateError                why the state of an earlier process cannot be used
     ├── StoreError                why a store on disk cannot be used
     ├── MemoryLockError           memory cannot be locked and --memory-lock=require was given
     └── UsageError                the command line cannot be carried out; exit status 1
"""

INTERNAL_ERROR = "Internal error; the log of secretd has the details"
"""The words of a reply whose command failed for an unknown reason."""


class SecretdError(Exception):
    """Root of all exceptions that secretd raises on purpose."""


class CommandError(SecretdError):
    """A command failed. ``desc`` is the text of the QMP error (QMP spec, section "Response")."""

    error_class = "GenericError"

    def __init__(self, desc: str) -> None:
        super().__init__(desc)
        self.desc = desc


class ArgumentError(CommandError):
    """The arguments are not those that the schema has."""


class CommandNotFound(CommandError):
    """The connection's table has no such command."""

    error_class = "CommandNotFound"


class DeviceNotFound(CommandError):
    """A QOM path or type name leads nowhere."""

    error_class = "DeviceNotFound"


class AccessDenied(CommandError):
    """The peer may not do this; what a client receives does not reveal whether an object exists."""


class LimitReached(CommandError):
    """A limit was reached.

    ``limit``: its name in query-secret-stats.
    """

    def __init__(self, limit: str, desc: str) -> None:
        super().__init__(desc)
        self.limit = limit


class LockedMemoryExhausted(CommandError):
    """No locked memory is left within RLIMIT_MEMLOCK, or unfinished messages fill their share of
    it.
    """


class PeerUnknown(SecretdError):
    """The kernel does not identify the peer completely; the text is the reason.

    ``uid``: the peer's, as far as it is known, else -1.
    """

    def __init__(self, words: str, uid: int = -1) -> None:
        super().__init__(words)
        self.uid = uid


class SourceError(SecretdError):
    """Why the source of an object's content cannot be read; each object type adds its words.

    ``limit``: the name of the limit in query-secret-stats, None if none was reached.
    """

    def __init__(self, words: str, limit: str | None = None) -> None:
        super().__init__(words)
        self.limit = limit


class StateError(SecretdError):
    """The arena or journal of an earlier process cannot be used; the text is the reason."""


class StoreError(SecretdError):
    """A store on disk cannot be used; the text is the reason, which no secret is part of."""


class MemoryLockError(SecretdError):
    """Secrets cannot be kept in locked memory, and the administrator requires it."""


class UsageError(SecretdError):
    """The command line cannot be carried out; the text is for the person who typed it."""
