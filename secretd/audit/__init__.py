# SPDX-License-Identifier: LGPL-2.1-or-later
"""Numbered, chained records of what was done, and where they are written."""
