# SPDX-License-Identifier: LGPL-2.1-or-later
"""From annotated functions to checked arguments, the schema and keyval: QEMU's qapi/."""
