# SPDX-License-Identifier: LGPL-2.1-or-later
"""asyncio over AF_UNIX with SCM_RIGHTS, and fairness between connections."""
