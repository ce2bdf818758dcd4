# SPDX-License-Identifier: LGPL-2.1-or-later
"""secretd: QEMU's secret object as a daemon of its own."""

__version__ = "0.1.0"
