# SPDX-License-Identifier: LGPL-2.1-or-later
"""One QMP session, and what all sessions share: QEMU's monitor/."""
