# SPDX-License-Identifier: LGPL-2.1-or-later
"""The service manager's protocols; this package knows nothing about secrets."""
