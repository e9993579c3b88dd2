"""Getting a board ready: what it is, what is wrong with it (`preflight`), and how it is flashed (`flash`).

Standard library only, and readable by Python 3.8: on a board of JetPack 5 it must still be able to say that no node
runs there. Nothing here has been run on hardware yet.
"""

import sys

if sys.version_info < (3, 8):  # noqa: UP036 - JetPack 4 has 3.6, which cannot even read the other files
    raise ImportError("not supported: Python %d.%d (JetPack 4 or older)" % sys.version_info[:2])  # noqa: UP031
