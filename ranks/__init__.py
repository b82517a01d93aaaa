"""What keeps processes sound: trust it.

One process per device starts, ranks stop after the same step, an error is said once, and nothing is
left behind, however a process ends.  Change it only with tests/test_launch.py, tests/test_stop.py
and tests/test_faults.py at hand: what goes wrong here goes wrong once in a thousand runs.
"""
