"""Benchmark of our training loop against other trainers: the workload, one module per trainer, measurement and tables."""
