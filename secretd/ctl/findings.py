# SPDX-License-Identifier: LGPL-2.1-or-later
"""The findings of `secretctl doctor`."""

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from secretd.ctl.output import Common

State = Literal["ok", "warning", "failed"]


class Finding(NamedTuple):
    """The result of a check; ``mend``: what to do about it, "" if nothing."""

    check: str
    state: State
    found: str
    mend: str = ""


Check = Callable[[Common], Iterator[Finding]]
