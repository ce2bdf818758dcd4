# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who the peer is and what it may read: the one decision."""
