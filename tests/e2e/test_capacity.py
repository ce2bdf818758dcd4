# SPDX-License-Identifier: LGPL-2.1-or-later
"""How much fits into an ordinary user's locked memory, and what happens when no more does."""

import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import SECRETD, WITHOUT_IPC_LOCK, Process
from tests.support.needs import need, need_level

LIMIT = 8 << 20
ADD = b'{"execute":"object-add","arguments":{"qom-type":"secret","id":"s%06d","data":"%032d"}}\n'
HERE = str(Path(__file__).parent.parent / "support")
NO_SECRETMEM = f"sys.path.insert(0, {HERE!r}); from seccomp import refuse; refuse(447); "


def limited(level: str) -> list[str]:
    """Secretd under RLIMIT_MEMLOCK without CAP_IPC_LOCK; for mlock, on a kernel without
    memfd_secret.
    """
    code = f"import resource; resource.setrlimit(resource.RLIMIT_MEMLOCK, ({LIMIT}, {LIMIT})); "
    if level == "mlock":
        code += NO_SECRETMEM
    code += "from secretd.daemon.main import main; sys.exit(main())"
    drop = WITHOUT_IPC_LOCK if os.getuid() == 0 else []
    return [*drop, str(Path(SECRETD).parent / "python"), "-c", "import sys; " + code]


@pytest.mark.parametrize("level", ["secretmem", "mlock"])
def test_100_000_secrets_fit_in_8_mib_and_one_more_fails(
    start: Callable[..., Process], level: str
) -> None:
    """Every one is reported locked; the error names the limit; all before it still work."""
    need_level(level)
    hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    need(hard in (-1, resource.RLIM_INFINITY) or hard >= LIMIT, f"RLIMIT_MEMLOCK is {hard}")
    process = start("--memory-lock=require", command=limited(level))
    client = process.connect()
    count = 0
    error = None
    while error is None:
        client.send(b"".join(ADD % (n, n) for n in range(count, count + 1000)))
        for _ in range(1000):
            reply = client.reply()
            if "error" in reply:
                error = error or reply["error"]["desc"]
            elif error is None:
                count += 1
    assert count >= 100_000
    assert error.startswith(
        "No locked memory left for another 262144 bytes: RLIMIT_MEMLOCK is 8388608"
    )
    assert "LimitMEMLOCK=" in error
    secrets = client.secrets()
    assert len(secrets) >= count
    assert {secret["memory"] for secret in secrets} == {level}
    for number in (0, 1, count // 2, count - 1):
        assert client.read(f"s{number:06}") == b"%032d" % number
    assert client.cmd("object-del", {"id": "s000000"}) == {"return": {}}
    assert client.add("again", data="x") == {"return": {}}
    status = Path(f"/proc/{process.pid}/status").read_text()
    locked = int(status.split("VmLck:")[1].split()[0]) * 1024
    assert locked <= LIMIT
    print(f"\n{level}: {count} secrets, {locked / count:.0f} bytes locked each")


def test_without_locked_memory_the_start_warns_or_is_refused(
    start: Callable[..., Process], tmp_path: Path
) -> None:
    """--memory-lock=prefer goes on and says so; require does not."""
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0)); "
    code += "from secretd.daemon.main import main; sys.exit(main())"
    command = [
        *(WITHOUT_IPC_LOCK if os.getuid() == 0 else []), str(Path(SECRETD).parent / "python"),
        "-c", code,
    ]  # fmt: skip
    process = start(command=command)
    assert "memory             none: MEMORY IS NOT LOCKED" in process.said
    assert "RLIMIT_MEMLOCK is 0 bytes" in process.said
    client = process.connect()
    client.add("s", data="x")
    assert client.ok("query-secrets")[0]["memory"] == "none"
    process.stop()
    with pytest.raises(
        AssertionError, match="--memory-lock=require was given: RLIMIT_MEMLOCK is 0"
    ):
        Process(tmp_path, "--memory-lock=require", command=command)
