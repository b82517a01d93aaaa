"""What decides a run's numbers: change it.

Read run.py (the parts), then train.py or evaluate.py (the loops); optim.py is one step, state.py
what a checkpoint means, resume.py which one a run goes on from, inference.py a faster -eval.  A
change here may change every result: the golden vectors, tests/test_exact.py and
tests/test_faults.py watch over it.
"""
