# SPDX-License-Identifier: LGPL-2.1-or-later
"""Start the secretd of a source tree: start.py TREE OPTION...

The environment has this checkout's secretd installed, so the tree comes first and the finder of the
installed one goes.
"""

import importlib
import sys

sys.path.insert(0, sys.argv.pop(1))
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
sys.argv[0] = "secretd"
try:
    main = importlib.import_module("secretd.daemon.main").main
except ImportError:  # before secretd had packages
    main = importlib.import_module("secretd.daemon").main
sys.exit(main())
