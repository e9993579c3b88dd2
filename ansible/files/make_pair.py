"""Make the CURVE pair of this machine where it is to stay: python - FOLDER NAME"""

import sys
from pathlib import Path

from testbed.wire.keys import make_pair, write_pair

write_pair(Path(sys.argv[1]).expanduser(), sys.argv[2], make_pair())
