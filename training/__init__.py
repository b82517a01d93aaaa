"""What decides a run's numbers: change it.

A run meets run.py, then train.py or evaluate.py, with optim.py for a step and state.py for what a
checkpoint means.  A change here may change every result: the golden vectors, tests/test_exact.py
and tests/test_faults.py watch over it.
"""
