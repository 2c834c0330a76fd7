"""`twofold` with ranks that fail on demand (see faulty_rank.py)."""

import sys
from pathlib import Path

from twofold.cli.main import main
from twofold.executor.local import LocalExecutor

LocalExecutor.command = (sys.executable, str(Path(__file__).with_name("faulty_rank.py")))

if __name__ == "__main__":
    sys.exit(main())
