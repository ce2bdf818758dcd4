# SPDX-License-Identifier: LGPL-2.1-or-later
"""System calls that Python 3.11 lacks, by ctypes. It holds no policy."""
