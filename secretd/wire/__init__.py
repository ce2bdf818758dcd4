# SPDX-License-Identifier: LGPL-2.1-or-later
"""The wire, sans-IO: bytes in, messages out. It has no socket, no event loop and no descriptors."""
