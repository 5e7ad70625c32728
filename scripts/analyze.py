"""Moved: python xbrl/scripts/analyze.py"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.command_line import moved

if __name__ == "__main__":
    sys.exit(moved("xbrl/scripts/analyze.py"))
