"""What decides a run's numbers: change it.

The loop, the optimizer and its schedule, validation, and what a checkpoint means stand here, in the
order in which a run meets them: run.py, train.py (or evaluate.py), optim.py, state.py.  A change
here may change every result, so tests/test_exact.py and the golden vectors watch over it.  Files on
disk are left to weights/, processes to ranks/.
"""
