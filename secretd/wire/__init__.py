# SPDX-License-Identifier: LGPL-2.1-or-later
"""The wire, sans-IO: bytes in, messages out. No socket, no event loop, no descriptors."""
