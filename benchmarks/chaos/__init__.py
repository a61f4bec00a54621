"""What `benchmarks/soak.py` and `benchmarks/overload.py` are made of: clients, faults, judgment, report."""
