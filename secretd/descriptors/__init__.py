# SPDX-License-Identifier: LGPL-2.1-or-later
"""Descriptors that clients pass, which may be hostile: in, out, and the threads for them."""
