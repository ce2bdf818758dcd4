# SPDX-License-Identifier: LGPL-2.1-or-later
"""Loading an object's content: its source, and the steps that all types share.

The creator of an object supplies a `SourceReader` for its ``file=`` and ``serial=``;
descriptors.source has those of connections and of the command line. The object types, the tree and
monitor.commands call this module.
"""

from collections.abc import Awaitable, Callable
from typing import NamedTuple, Protocol, TypeVar

from secretd.errors import CommandError, LimitReached, SourceError
from secretd.memory.arena import Arena, LockedBuffer

T = TypeVar("T")
R = TypeVar("R")


async def then(outcome: Awaitable[T], use: Callable[[T], R]) -> R:
    """Return ``use(value)`` of the value that ``outcome`` has later."""
    return use(await outcome)


class SourceReader(Protocol):
    """The reader of new objects' content, with the rights of their creator.

    Both methods return the content between two spare bytes in scratch memory. They raise
    SourceError, and AccessDenied if the creator may not name the source. ``uid``: the creator's.
    """

    uid: int

    def file(self, name: str) -> "LockedBuffer | Awaitable[LockedBuffer]":
        """Read ``file=NAME``."""

    def key(self, serial: int) -> "LockedBuffer | Awaitable[LockedBuffer]":
        """Read a key of the kernel's keyrings; ``serial`` is an int32."""


class KeyLookup(Protocol):
    """A type's way to the secret that its ``keyid`` names."""

    def __call__(self, keyid: str, uid: int, loading: str) -> memoryview:
        """Return the key's plaintext, borrowed. Raises CommandError; see ObjectTree.key."""


class Loading(NamedTuple):
    """What a type needs to load the content of a new object.

    Plaintext belongs in ``arena``, intermediate results in ``scratch``; both are locked memory.
    """

    arena: Arena
    scratch: Arena
    sources: SourceReader
    key: KeyLookup


def use_content(
    read: Callable[[], LockedBuffer | Awaitable[LockedBuffer]],
    use: Callable[[LockedBuffer], R],
    what: str,
) -> R | Awaitable[R]:
    """Return ``use(content)`` of the content that ``read`` returns, at once or later; then free the
    content.

    ``what``: the source's name in errors. Raises CommandError, also later.
    """
    try:
        content = read()
    except SourceError as error:
        raise _unreadable(what, error) from None
    if not isinstance(content, LockedBuffer):
        return _use_later(content, use, what)
    with content:
        return use(content)


async def _use_later(
    content: Awaitable[LockedBuffer], use: Callable[[LockedBuffer], R], what: str
) -> R:
    try:
        with await content as buffer:
            return use(buffer)
    except SourceError as error:
        raise _unreadable(what, error) from None


def _unreadable(what: str, error: SourceError) -> CommandError:
    words = f"Unable to read {what}: {error}"
    return CommandError(words) if error.limit is None else LimitReached(error.limit, words)


def printable(name: str) -> str:
    """Return a file name as errors print it, with U+FFFD for bytes that argv could not decode."""
    return name.encode(errors="surrogateescape").decode(errors="replace")
