# SPDX-License-Identifier: LGPL-2.1-or-later
"""Listeners and sessions, their orderly stop, and the credentials socket."""
