# SPDX-License-Identifier: LGPL-2.1-or-later
"""Base64 and AES between locked buffers. The only package that imports cryptography."""
