"""Microbenchmarks, installed as ``sidp_runtime.bench``. METHODOLOGY.md says how each figure is measured."""
