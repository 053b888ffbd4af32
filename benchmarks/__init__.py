"""Benchmarks: this interpreter beside DSPy's own, interleaved in one run. ``make bench``, see docs/performance.md."""
