# SPDX-License-Identifier: LGPL-2.1-or-later
"""Random input against the parsers and against QEMU."""
