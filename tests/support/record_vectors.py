# SPDX-License-Identifier: LGPL-2.1-or-later
"""Record what real QEMU answers in the transcripts of tests/vectors: 10 is the reference, 7.2 where
it differs. Needs both and keyutils; scripts/dev/record-vectors calls it. Arguments: names of files,
else all.
"""

import contextlib
import json
import sys
from pathlib import Path

from secretd.monitor.commands import COMMANDS
from secretd.monitor.events import EVENTS
from tests.support.real_qemu import Qemu, ask, storage_daemon
from tests.support.transcript import (
    FILES,
    OPTIONS,
    SCHEMA,
    SocketPeer,
    expanded,
    load,
)


def record(path: Path, ten: Qemu, seven: Qemu) -> None:
    """Rewrite the answers in a file."""
    vectors = iter(load(path))
    lines: list[str] = []
    answers: list[tuple[list[str], list[str]]] = []
    differences: dict[int, list[str]] = {}
    replies: list[str] = []
    old: list[str] = []
    number = 0

    def finish() -> None:
        for index, reply in enumerate(replies):
            lines.append(f"<- {reply}")
            lines.extend(differences.get(index, []))
        if old != replies:
            lines.extend(f"<7 {reply}" for reply in old or [""])

    for line in path.read_text().splitlines():
        mark = line.partition(" ")[0]
        if mark in ("<-", "<7"):
            number += mark == "<-"
            continue
        if mark == "!=":
            differences.setdefault(number - 1, []).append(line)
            continue
        finish()
        replies, old, differences, number = [], [], {}, 0
        if mark == "=":
            vector = next(vectors)
            answers = list(zip(ten.record(vector), seven.record(vector), strict=True))
        if mark == "->":
            replies, old = answers.pop(0)
        lines.append(line)
    finish()
    path.write_text("\n".join(lines) + "\n")


def record_options() -> None:
    """Rewrite the answers in the file of options."""
    lines = []
    for line in OPTIONS.read_text().splitlines():
        mark, _, text = line.partition(" ")
        if mark in ("<-", "=="):
            continue
        if mark == "!=":
            lines.append(line)
            continue
        lines.append(line)
        if mark == "->":
            words, printed = storage_daemon(json.loads(text))
            if printed:
                lines.append(f"== {json.dumps(printed)}")
            if words:
                lines.append(f"<- {json.dumps(words)}")
    OPTIONS.write_text("\n".join(lines) + "\n")


def record_schema(ten: Qemu) -> None:
    """Write what QEMU's schema says of the commands and events that secretd has too."""
    peer = SocketPeer(ten.path)
    peer.line()
    ask(peer, "qmp_capabilities")
    schema = ask(peer, "query-qmp-schema")["return"]
    peer.close()
    known = {entry["name"] for entry in schema}
    shared = sorted(known & {*COMMANDS.by_name, *EVENTS})
    found = {name: expanded(schema, name) for name in shared}
    tree = found["object-add"]["arg-type"]
    ours = COMMANDS.by_name["object-add"].arguments
    tree["variants"] = [v for v in tree["variants"] if v["case"] in ours]
    (tag,) = (m["type"] for m in tree["members"] if m["name"] == "qom-type")
    tag["members"] = [m for m in tag["members"] if m["name"] in ours]
    tag["values"] = [v for v in tag["values"] if v in ours]
    SCHEMA.write_text(json.dumps(found, indent=1) + "\n")


def main() -> None:
    """Record the files named, or all."""
    wanted = sys.argv[1:]
    if not wanted or OPTIONS.stem in wanted:
        print(OPTIONS.name, flush=True)
        record_options()
    with contextlib.closing(Qemu("qemu10")) as ten, contextlib.closing(Qemu("qemu7")) as seven:
        if not wanted or SCHEMA.stem in wanted:
            print(SCHEMA.name, flush=True)
            record_schema(ten)
        for path in FILES:
            if not wanted or path.stem in wanted:
                print(path.name, flush=True)
                record(path, ten, seven)


if __name__ == "__main__":
    main()
