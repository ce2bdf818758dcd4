# SPDX-License-Identifier: LGPL-2.1-or-later
"""How Sphinx builds these pages; scripts/dev/docs calls it.

Tables that the code decides are made from it.
"""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "scripts/dev"), str(HERE.parent)]

import reference  # noqa: E402

from secretd import __version__  # noqa: E402

reference.write(HERE / "reference" / "generated")

project = "secretd"
author = "the secretd developers"
copyright = "the secretd developers"  # noqa: A001 - Sphinx's name
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]
copybutton_prompt_text = "$ "
myst_enable_extensions = ["deflist", "fieldlist"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "reference/generated", "README.md"]
suppress_warnings = ["myst.xref_missing"] if "man" in sys.argv else []

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
smartquotes = False
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = f"secretd {__version__}"
html_show_sourcelink = False
html_static_path = ["static"]
html_css_files = ["pages.css"]

man_pages = [
    (
        "man/secretd",
        "secretd",
        "keep secrets in locked memory and hand them out, over QMP",
        author,
        "8",
    ),
    ("man/secretctl", "secretctl", "add secrets to secretd, and hand them on", author, "1"),
    ("man/secretd-fleet", "secretd-fleet", "bring secrets to many hosts through etcd", author, "1"),
    ("man/secretd-qmp", "secretd-qmp", "the protocol of secretd", author, "7"),
]
man_show_urls = True
