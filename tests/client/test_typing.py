# SPDX-License-Identifier: LGPL-2.1-or-later
"""The types of secretd.client, as its users' code sees them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # it starts processes, or tries many cases

ROOT = Path(__file__).parent.parent.parent


def test_a_users_code_is_checked_by_the_types_of_the_client(tmp_path: Path) -> None:
    """From outside of this checkout, in strict mode; tests/e2e/test_wheel.py has the installed
    package.
    """
    code = tmp_path / "uses.py"
    code.write_text((ROOT / "tests/typing/uses.py").read_text())
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-incremental", "--config-file=", str(code)],
        env=os.environ | {"MYPYPATH": str(ROOT)}, cwd=tmp_path, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.stdout == "Success: no issues found in 1 source file\n", done.stdout + done.stderr
