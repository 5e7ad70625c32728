"""Does a run survive kills, damaged files and long use? scripts/chaos.py and scripts/soak.py (docs/reliability.md)."""
