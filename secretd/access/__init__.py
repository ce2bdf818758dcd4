# SPDX-License-Identifier: LGPL-2.1-or-later
"""The peer's identity, and the one decision about what it may read."""
