# SPDX-License-Identifier: LGPL-2.1-or-later
"""The objects' property store in a memfd, which the next process takes over."""
