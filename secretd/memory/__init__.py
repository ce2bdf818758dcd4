# SPDX-License-Identifier: LGPL-2.1-or-later
"""Locked memory: the only home of plaintext."""
