"""Moved: python xbrl/scripts/regulator.py"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.command_line import moved

if __name__ == "__main__":
    law = "law is now python -m tests.xbrl.rules.law_check FILE"
    sys.exit(moved("xbrl/scripts/regulator.py", f"cpt and examples have the same options, {law}, and dpm is gone"))
