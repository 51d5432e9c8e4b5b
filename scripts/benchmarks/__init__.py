"""The benchmarks of ``scripts/bench.py``, one a file."""
