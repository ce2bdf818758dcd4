# SPDX-License-Identifier: LGPL-2.1-or-later
"""The service manager's protocols. Knows nothing about secrets."""
