# SPDX-License-Identifier: LGPL-2.1-or-later
"""Print an SBOM of secretd and what it needs to run, as CycloneDX, from the lock file
(scripts/dev/package).
"""

import os
import re
import sys
from datetime import UTC, datetime
from pathlib import Path
from uuid import NAMESPACE_URL, uuid5

from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import LicenseExpression
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

ROOT = Path(__file__).resolve().parent.parent.parent


def component(name: str, version: str, hashes: list[str]) -> Component:
    """A package of PyPI, with the hashes of all its files."""
    return Component(
        name=name,
        version=version,
        type=ComponentType.LIBRARY,
        purl=PackageURL("pypi", None, name, version),
        bom_ref=f"{name}=={version}",
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=digest) for digest in hashes],
    )


def main() -> None:
    """Read the first part of the lock file: what secretd needs to run."""
    lock = Path(sys.argv[1]).read_text().partition("# fleet")[0]
    match = re.search(r'__version__ = "(.+)"', (ROOT / "secretd/__init__.py").read_text())
    assert match is not None
    bom = Bom()
    root = Component(
        name="secretd",
        version=match[1],
        type=ComponentType.APPLICATION,
        bom_ref="secretd",
        purl=PackageURL("pypi", None, "secretd", match[1]),
        licenses=[LicenseExpression("LGPL-2.1-or-later")],
    )
    bom.metadata = BomMetaData(component=root)
    when = int(os.environ.get("SOURCE_DATE_EPOCH", "0"))
    bom.metadata.timestamp = datetime.fromtimestamp(when, UTC)
    parts = [
        component(name, version, re.findall(r"sha256:([0-9a-f]{64})", hashes))
        for name, version, hashes in re.findall(
            r"^([a-z0-9-]+)==(\S+) \\\n((?:    --hash=.*\n)+)", lock, re.MULTILINE
        )
    ]
    for part in parts:
        bom.components.add(part)
    bom.register_dependency(root, parts)
    bom.serial_number = uuid5(NAMESPACE_URL, f"secretd-{match[1]}-{lock}")
    print(JsonV1Dot6(bom).output_as_string(indent=2))


if __name__ == "__main__":
    main()
