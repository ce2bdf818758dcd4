# SPDX-License-Identifier: LGPL-2.1-or-later
"""Numbered, chained records of events, and where they are written."""
