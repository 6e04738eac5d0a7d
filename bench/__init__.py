"""Benchmarks. Each module's `measure(args)` yields (round, case, figures) as they become known."""
