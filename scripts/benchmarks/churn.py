# SPDX-License-Identifier: LGPL-2.1-or-later
"""A client that adds and deletes objects without end: churn.py SOCKET RESIDENT, until it is killed.

RESIDENT: objects r0, r1 and so on that exist, which it deletes in turn; in their place it adds
others, whose ids have changing lengths. It sends windows of 64 requests.
"""

import random
import sys

from flood import connect

PAIRS = 32


def main() -> None:
    """See above."""
    path, resident = sys.argv[1:3]
    rng = random.Random(1)
    sock = connect(path)
    print("ready", flush=True)
    ids = [f"r{number}" for number in range(int(resident))]
    number = 0
    while True:
        lines = []
        for _ in range(PAIRS):
            number += 1
            index = rng.randrange(len(ids))
            lines.append(f'{{"execute":"object-del","arguments":{{"id":"{ids[index]}"}}}}\n')
            ids[index] = f"c{number}{'-' * rng.randrange(60)}"
            lines.append(
                '{"execute":"object-add","arguments":{"qom-type":"secret","id":"'
                + ids[index]
                + '","data":"0123456789abcdef0123456789abcdef"}}\n'
            )
        sock.sendall("".join(lines).encode())
        answered = 0
        while answered < 2 * PAIRS:
            data = sock.recv(1 << 16)
            if b"error" in data or not data:
                sys.exit(f"churn: {data!r}")
            answered += data.count(b"\n")


if __name__ == "__main__":
    main()
