# SPDX-License-Identifier: LGPL-2.1-or-later
"""The objects, after QEMU's object model (QOM): the tree, its types, and the secrets in it."""
