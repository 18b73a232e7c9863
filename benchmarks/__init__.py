"""Programs that measure both sides in one run and print JSON. Run as `python -m benchmarks.NAME --json`."""
