"""Counts what passes between the host and the device through Paddle's Python surface."""

import numpy as np
import paddle

# What the host gets from a device, waiting for it.
READS = ("numpy", "item", "tolist", "cpu", "__array__")
READS += ("__bool__", "__float__", "__int__", "__index__")
# What changes a tensor to something that the host has, waiting for the device.
WRITES = ("set_value", "copy_", "_copy_to", "cuda", "pin_memory")


def count_crossings(monkeypatch):
    """A dict that fills from now on: "read", "copied" and "queued" to lists of what did it.

    "copied" are tensors from the host's numbers for which the host waits; those of one number are
    none, as Paddle makes them on the device.  "queued" are the sizes of host arrays that an
    operator takes with it.
    """
    seen = {"read": [], "copied": [], "queued": []}

    def watch(owner, name, note):
        real = getattr(owner, name)

        def watched(*args, **kwargs):
            note(name, *args, **kwargs)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    for name in READS:
        watch(paddle.Tensor, name, lambda name, *args, **kwargs: seen["read"].append(name))
    for name in WRITES:
        watch(paddle.Tensor, name, lambda name, *args, **kwargs: seen["copied"].append(name))

    def note_tensor(name, data, *args, **kwargs):
        if np.size(data) != 1:
            seen["copied"].append(f"to_tensor of {np.shape(data)}")

    def note_arrays(name, *args, **kwargs):
        if name == "assign_value_":
            seen["queued"].append(len(args[3]))
        elif any(isinstance(value, np.ndarray) for value in (*args, *kwargs.values())):
            seen["copied"].append(name)

    watch(paddle.tensor.creation, "_to_tensor_non_static", note_tensor)
    for name in vars(paddle._C_ops):
        if not name.startswith("__") and callable(getattr(paddle._C_ops, name)):
            watch(paddle._C_ops, name, note_arrays)
    return seen
