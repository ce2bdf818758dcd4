# SPDX-License-Identifier: LGPL-2.1-or-later
"""The store: sealed rows on disk, so that secrets survive a reboot."""
