# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verb watch: events about secrets and grants, as they happen."""

import itertools
import json
import sys
import time

from secretd.client import Event
from secretd.ctl.connection import client_of
from secretd.ctl.identities import named_identity
from secretd.ctl.output import Common, note
from secretd.ctl.verb import flag, verb


@verb("watch", flag("--once", help="end after the first event"))
def watch(common: Common, once: bool) -> None:
    """Print events about secrets, grants and the store as they happen.

    On the control socket with the peer that caused them; on the client socket about secrets that
    the caller may read. It says when secretd goes away and comes back, and goes on then.
    """
    with client_of(common) as client:
        if sys.stderr.isatty() and not common.json:
            note(f"watching {client.path}; Ctrl-C ends it")
        events = client.events(on_change=_say)
        for event in itertools.islice(events, 1) if once else events:
            print(_described(event, as_json=common.json), flush=True)


def _say(connected: bool) -> None:
    words = "is back" if connected else "went away; events until it is back are missing"
    note(f"{time.strftime('%H:%M:%S')}  secretd {words}")


def _described(event: Event, *, as_json: bool) -> str:
    if as_json:
        return json.dumps({"time": event.time, "event": event.name, **event.data})
    clock = time.strftime("%H:%M:%S", time.localtime(event.time))
    by = ""
    if event.peer is not None:
        name = event.peer.get("unit") or named_identity(f"uid:{event.peer['uid']}")
        by = f"  by {name}, pid {event.peer['pid']}"
    what = event.id or json.dumps(event.data)
    if "state" in event.data:
        what += f" is {event.data['state']}"
        what += f": {event.data['reason']}" if "reason" in event.data else ""
    if "secret" in event.data:
        what += f" for {event.data['secret']}"
    return f"{clock}  {event.name:<18}  {what}{by}"
