# SPDX-License-Identifier: LGPL-2.1-or-later
"""The objects of ``--object`` and ``--object-dir``, created before the first connection is
accepted.

It opens only what the objects name. daemon.process calls it, with the texts that argv has left.
"""

import logging
import os
import re

from secretd.daemon import redaction
from secretd.daemon.object_files import read_directory
from secretd.descriptors.source import CommandLineSources
from secretd.errors import CommandError, LockedMemoryExhausted, UsageError
from secretd.monitor.commands import COMMANDS
from secretd.qapi import keyval
from secretd.qapi.command import check
from secretd.qom.identifiers import with_hint
from secretd.qom.object_type import ObjectOptions
from secretd.qom.renewal import renew
from secretd.qom.secret import SecretOptions
from secretd.qom.tree import ObjectTree

log = logging.getLogger("secretd")


class InitialObjects:
    """Creates the objects of the options, one after the other.

    ``hidden``: descriptors with values of data=. ``required``: fail the start if an object cannot
    be added, instead of logging that. ``made``: the ids of the created objects, without equal ones
    of an earlier process.
    """

    def __init__(self, tree: ObjectTree, hidden: list[int], *, required: bool = True) -> None:
        self._tree = tree
        self._loading = tree.loading(CommandLineSources(tree.scratch))
        self._hidden = [f"/dev/fd/{fd}" for fd in hidden]
        self._required = required
        self._named: set[str] = set()
        self.made: list[str] = []

    def make(self, text: str) -> bool:
        """Create the object of ``--object TEXT``; return False if help was requested and printed.

        Raises UsageError that names the option.
        """
        try:
            options = parse(self._tree, text)
            if options is None:
                return False
            try:
                self._make(options)
            except CommandError as error:
                if self._required:
                    raise UsageError(with_hint(error.desc) + _credential_hint(options)) from None
                words = self._words(text, error.desc)
                log.error("%s; started without it (--object-policy=best-effort)", words)
        except UsageError as error:
            raise UsageError(self._words(text, str(error))) from None
        return True

    def make_from(self, directory: str) -> None:
        """Create the objects of the files in a directory. Raises UsageError that names file and
        line.
        """
        for place, options in read_directory(directory, self._tree.scratch):
            try:
                self._make(options)
            except CommandError as error:
                words = f"{place}: {with_hint(error.desc)}"
                if self._required:
                    raise UsageError(words + _credential_hint(options)) from None
                log.error("%s; started without it (--object-policy=best-effort)", words)

    def _make(self, options: ObjectOptions) -> None:
        changes: dict[str, object] = {}
        if isinstance(options, SecretOptions) and options.file in self._hidden:
            changes["file"] = ""
        if options.id in self._named:
            self._tree.check_new(options.id)
        try:
            if renew(self._tree, options, self._loading, changes):
                self.made.append(options.id)
        except LockedMemoryExhausted as error:
            if options.id not in self._tree.journal:
                raise
            # There is no memory to check whether it has changed.
            log.warning("object '%s' stays as it was: %s", options.id, error.desc)
        self._named.add(options.id)
        self._tree.fixed.add(options.id)

    def _words(self, text: str, words: str) -> str:
        """Return an error with the option's text, without the values that may carry a secret."""
        if text.startswith("{") and not _is_json(text):
            # The quotations may be parts of a secret.
            words = re.sub("'[^']*'", "'…'", words)
        shown = f"--object {redaction.shown(text, self._hidden)}: {words}"
        return f"{shown}; {redaction.COMMA_HINT}" if redaction.is_unfinished_value(text) else shown


def _is_json(text: str) -> bool:
    try:
        keyval.arguments(keyval.buffer(text))
    except UsageError:
        return False
    return True


def parse(tree: ObjectTree, text: str) -> ObjectOptions | None:
    """Return the options in ``--object TEXT``; None for a request for help, which is printed.

    Raises UsageError in QEMU's words.
    """
    given = keyval.arguments(keyval.buffer(text))
    if given.help:
        print(tree.types.help(given.members.get("qom-type")), end="")
        return None
    try:
        options = check(COMMANDS.by_name["object-add"], given.members, given.visitor)
    except CommandError as error:
        raise UsageError(error.desc) from None
    assert isinstance(options, ObjectOptions)
    return options


def _credential_hint(options: ObjectOptions) -> str:
    """Return a hint if the file is a missing credential of secretd's own unit: systemd starts the
    unit all the same.
    """
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    file = getattr(options, "file", None)
    if not directory or not isinstance(file, str) or os.path.dirname(file) != directory:
        return ""
    name = os.path.basename(file)
    return (
        f"\nsystemd has set up no credential '{name}' for this unit: see LoadCredentialEncrypted= "
        "there and "
        f"/etc/credstore.encrypted/{name}; --object-policy=best-effort starts without this object"
    )
