# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the checks of `secretctl doctor` find."""

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from secretd.ctl.output import Common

State = Literal["ok", "warning", "failed"]


class Finding(NamedTuple):
    """What a check has found; ``mend``: what to do about it, "" where nothing is to be done."""

    check: str
    state: State
    found: str
    mend: str = ""


Check = Callable[[Common], Iterator[Finding]]
