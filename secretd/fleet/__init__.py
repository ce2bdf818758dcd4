# SPDX-License-Identifier: LGPL-2.1-or-later
"""The program secretd-fleet: it carries rosters, manifests and records through etcd."""
