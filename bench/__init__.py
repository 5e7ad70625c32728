"""What scripts/bench.py runs: the workload, one file an arm, and how an arm is watched."""
