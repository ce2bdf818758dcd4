# SPDX-License-Identifier: LGPL-2.1-or-later
"""What tests share: real parts, clients and notations."""
