"""What keeps files sound: trust it.

A weight file is read without running code from it, a checkpoint is whole or not there, and weights
go into a model all or none.  Change it only with tests/test_pdparams.py and tests/test_faults.py at
hand: what they promise cannot be seen by reading.

    from weights import assign_weights, load_weights, resample_weights
"""

from weights.checkpoint import assign_weights, load_into, load_weights
from weights.pdparams import WeightsError
from weights.resample import resample_weights

__all__ = ["WeightsError", "assign_weights", "load_into", "load_weights", "resample_weights"]
