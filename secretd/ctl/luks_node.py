# SPDX-License-Identifier: LGPL-2.1-or-later
"""A LUKS disk of a running QEMU: its keyslots are changed by x-blockdev-amend over QMP.

A node keeps the id of the secret that it was opened with, so that id stays. The other version has
an id of its own (``secretd-rotate-new``, ``-old``) meanwhile, and at the end the first id gets the
kept version's value. A read-only node beside the guest's tries which passphrase opens the disk.
QEMU 10.0 ends with an assertion when it amends a ``luks`` node, and the guest with it; so
luks_canary tries the same on a throw-away image first, with the same binary.
"""

import contextlib
import json
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from secretd.client import SyncClient
from secretd.client.channel import Channel, Lost, Refused
from secretd.client.plans import for_qemu
from secretd.ctl.connection import say_waiting
from secretd.ctl.luks_canary import check_survives
from secretd.ctl.output import Common
from secretd.ctl.qemu import NOT_TEXT, WRONG, ask, no_way_back, run_job
from secretd.errors import UsageError
from secretd.linux import peercred

_PROBE: Final = "secretd-probe"
_NEW: Final = "secretd-rotate-new"
_OLD: Final = "secretd-rotate-old"
_JOB: Final = "secretd-amend"
_KEYS: Final = ("qmp", "node", "secret", "master", "pid")


TRYING_SECONDS: Final = 15.0
"""Seconds after which QEMU should have tried a passphrase, and a person learns what is waited for.
"""


class Disk(NamedTuple):
    """A node of QEMU: its driver, luks or qcow2, the name of the node under it, and the id of the
    secret that it was opened with.
    """

    driver: str
    file: str
    secret: str


def _options(node: dict[str, Any]) -> dict[str, Any]:
    """Return the options that open a node again, as QEMU describes it."""
    text = str(node["file"])
    if text.startswith("json:"):
        options: dict[str, Any] = json.loads(text.removeprefix("json:"))
        return options
    return {"driver": node["drv"], "filename": text}


def _key(options: dict[str, Any]) -> str:
    """Return the id of the secret with which a node was opened, "" for none."""
    return str(options.get("key-secret") or options.get("encrypt.key-secret", ""))


class LuksNode:
    """The node ``node`` of the QEMU at the other end of a channel.

    ``secret``: the id that the node's secret has in QEMU, "" to ask the node. ``master``: the id of
    the key that secretd and QEMU both hold, "" to send values in base64. ``iter_time``:
    milliseconds to try a new passphrase, None for QEMU's default.
    """

    def __init__(  # noqa: PLR0917 - what a disk of a QEMU is
        self,
        client: SyncClient,
        qemu: Channel,
        node: str,
        secret: str,
        master: str,
        pid: int,
        iter_time: int | None,
    ) -> None:
        self._client = client
        self._qemu = qemu
        self._node = node
        self._master = master
        self._pid = pid
        self._more = {} if iter_time is None else {"iter-time": iter_time}
        self._disk = self._found()
        self._secret = secret or self._disk.secret
        self._survives = False

    @classmethod
    @contextlib.contextmanager
    def of(
        cls, common: Common, client: SyncClient, options: str, iter_time: int | None
    ) -> "Iterator[LuksNode]":
        """Yield the node of ``qmp=SOCKET,node=NODE[,secret=ID][,master=ID][,pid=N]``.

        Raises UsageError.
        """
        given = dict(part.partition("=")[::2] for part in options.split(","))
        unknown = [name for name in given if name not in _KEYS]
        if unknown or not given.get("node") or not given.get("pid", "1").isdecimal():
            raise UsageError(
                f"--luks {options}: expected qmp=SOCKET,node=NODE[,secret=ID][,master=ID][,pid=N]"
            )
        path = given["qmp"]
        try:
            qemu = Channel(path, common.timeout, say_waiting)
        except (Refused, Lost, TimeoutError) as error:
            raise UsageError(f"{path}: {error}") from None
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}; is QEMU running?") from None
        try:
            qemu.patience = TRYING_SECONDS
            pid = int(given["pid"]) if "pid" in given else peercred.credentials(qemu.sock)[0]
            secret, master = given.get("secret", ""), given.get("master", "")
            yield cls(client, qemu, given["node"], secret, master, pid, iter_time)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UsageError(
                f"{path}: what answers there is no QEMU ({type(error).__name__})"
            ) from None
        except (Lost, TimeoutError) as error:
            raise UsageError(
                f"QEMU does not answer any more: {error}; both versions are held, and running "
                "rotate again goes on"
            ) from None
        finally:
            qemu.close()

    # --- the steps of a Resource

    def accepts(self, version: str) -> bool:
        """Return True if a version opens it."""
        self._put(version, _NEW)
        return self._opens(_NEW)

    def apply(self, old: str, new: str) -> None:  # noqa: ARG002 - QEMU has the other one
        """Add a keyslot for the new passphrase, unless it has one."""
        if self._secret not in self._objects():
            raise UsageError(
                f"QEMU has no secret '{self._secret}'; secret=ID names the one that the node "
                f"'{self._node}' was opened with"
            )
        name = _NEW
        self._put(new, name)
        if not self._opens(name):
            self._amend({"state": "active", "new-secret": name, **self._more})
            self._check_opens(name, new)

    def restore(self, old: str, new: str) -> None:  # noqa: ARG002 - the other one of a Resource
        """Check the passphrase, whose keyslot is there until it is retired."""
        name = _NEW
        self._put(new, name)
        if not self._opens(name):
            raise no_way_back(f"node '{self._node}'", new)

    def undo(self, gone: str, kept: str) -> None:
        """Remove the keyslot of the new passphrase, if it has one."""
        self._put(gone, _NEW)
        if self._opens(_NEW):
            self.retire(gone, kept)
        else:
            self._remove(_NEW)

    def retire(self, gone: str, kept: str) -> None:
        """Remove the keyslots of a passphrase, if the other one opens the disk, and give QEMU the
        kept one under the id that the node knows.
        """
        kept_name, gone_name = _NEW, _OLD
        self._put(kept, kept_name)
        self._check_opens(kept_name, kept)
        self._put(gone, gone_name)
        if self._opens(gone_name):
            self._amend({"state": "inactive", "old-secret": gone_name})
        self._put(kept, self._secret)
        for name in (gone_name, kept_name):
            self._remove(name)

    # --- QEMU

    def _found(self) -> Disk:
        nodes = self._ask("query-named-block-nodes", {"flat": True})
        by_name = {each["node-name"]: each for each in nodes}
        node = by_name.get(self._node)
        if node is None:
            raise UsageError(f"QEMU has no node '{self._node}'; it has {', '.join(by_name)}")
        driver, data = node["drv"], node["image"].get("format-specific", {}).get("data", {})
        encrypted = driver == "luks" or data.get("encrypt", {}).get("format") == "luks"
        if driver not in ("luks", "qcow2") or not encrypted:
            raise UsageError(f"node '{self._node}' is neither luks nor qcow2 with LUKS")
        options = _options(node)
        under = options.get("file", {"driver": "file", "filename": node["file"]})
        files = [name for name, each in by_name.items() if _options(each) == under]
        if not files:
            raise UsageError(
                f"the node under '{self._node}' has no name by which QEMU can try a passphrase; "
                "shut the guest down and use --luks IMAGE"
            )
        key = _key(options)
        others = [
            name
            for name, each in by_name.items()
            if name != self._node and key and _key(_options(each)) == key
        ]
        if others:
            raise UsageError(
                f"QEMU opened '{others[0]}' with the same secret '{key}' as '{self._node}': give "
                "each disk a secret of its own, since the value ends for all of them"
            )
        return Disk(driver, files[0], key)

    def _ask(self, command: str, arguments: object = None) -> Any:
        return ask(self._qemu, command, arguments)

    def _objects(self) -> set[str]:
        return {each["name"] for each in self._ask("qom-list", {"path": "/objects"})}

    def _remove(self, name: str) -> None:
        if name in self._objects():
            self._ask("object-del", {"id": name})

    def _put(self, version: str, name: str) -> None:
        """Give QEMU a version under an id of its own."""
        self._remove(name)
        if self._master:
            sealed = self._client.seal(version, self._master)
            self._ask("object-add", for_qemu(sealed, name, self._master))
            return
        head = (
            f'{{"execute": "object-add", "arguments": {{"qom-type": "secret", "id": "{name}", '
            '"format": "base64", "data": "'
        ).encode()
        tail = b'"}}\n'
        with self._client.read(version, format="base64") as text:
            size = len(head) + text.size + len(tail)
            with self._client.buffer(size) as line:
                line.view[: len(head)] = head
                line.view[len(head) : -len(tail)] = text.view
                line.view[-len(tail) :] = tail
                self._qemu.send(line.view)
                reply = self._qemu.reply("object-add")
        if "error" in reply:
            raise UsageError(f"QEMU says: {reply['error'].get('desc')}")

    def _opens(self, name: str) -> bool:
        """Return True if a secret of QEMU opens the disk: tried by a read-only node beside its own,
        with a node between that lets the guest write on.
        """
        self._qemu.exchange("blockdev-del", {"node-name": _PROBE})  # of an interrupted try
        shared = {"read-only": True, "force-share": True}
        key: dict[str, Any] = {"key-secret": name}
        if self._disk.driver == "qcow2":
            key = {"encrypt": {"format": "luks", **key}, "backing": None}
        reply = self._qemu.exchange(
            "blockdev-add",
            {
                "driver": self._disk.driver, "node-name": _PROBE, **shared, **key,
                "file": {"driver": "raw", "file": self._disk.file, **shared},
            },
        )  # fmt: skip
        if "error" not in reply:
            self._ask("blockdev-del", {"node-name": _PROBE})
            return True
        words = str(reply["error"].get("desc"))
        if WRONG not in words and NOT_TEXT not in words:
            raise UsageError(f"QEMU says: {words}")
        return False

    def _check_opens(self, name: str, version: str) -> None:
        if not self._opens(name):
            raise UsageError(
                f"'{version}' does not open the disk of node '{self._node}'; nothing was removed"
            )

    def _amend(self, change: dict[str, Any]) -> None:
        """Change the keyslots."""
        if not self._survives:
            check_survives(self._pid, self._disk.driver)
            self._survives = True
        options: dict[str, Any] = {"driver": self._disk.driver, **change}
        if self._disk.driver == "qcow2":
            options = {"driver": "qcow2", "encrypt": {"format": "luks", **change}}
        arguments = {"node-name": self._node, "options": options}
        words = run_job(self._qemu, "x-blockdev-amend", _JOB, arguments)
        if words:
            raise UsageError(f"QEMU says: {words}")
