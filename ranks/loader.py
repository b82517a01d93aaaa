"""Batches from worker processes, none of which is left behind or fails without a sentence.

with contextlib.closing(build_loader(dataset, sampler, num_workers, image_size)) as batches:
    for images, labels in batches:
        ...
"""

import contextlib
import errno
import functools
import gc
import multiprocessing
import os
import signal
import time
import traceback

import numpy as np
import paddle
from paddle.io.dataloader.worker import _ResumeIteration

from ranks.host import die_with_parent, remove_batches, stop_signals
from utils import DataError, cause

_PREFETCH = 2  # batches that each loader worker works ahead
_END_SECONDS = 10  # for a worker to finish the batch that it is at


class _Fetch(paddle.io.Dataset):
    """A data set whose errors come as values.

    Paddle's reader threads print the traceback of an exception and give the training loop another
    one, without the message; so an error travels to the loop as a batch (_collate, _unpack).
    """

    def __init__(self, dataset):
        super().__init__()
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, key):
        try:
            return self.dataset[key]
        except Exception as error:  # a bug too must end the run, with its traceback
            return error if isinstance(error, DataError) else DataError(traceback.format_exc())


def _collate(samples):
    """uint8 [batch, H, W, 3] and int64 [batch]; an error as one axis and its message's bytes."""
    for sample in samples:
        if isinstance(sample, DataError):
            message = str(sample).encode(errors="replace")  # a path need not be UTF-8
            return np.zeros(1, np.uint8), np.frombuffer(message, np.uint8)
    pixels, labels = zip(*samples)
    return np.stack(pixels), np.array(labels, dtype=np.int64)


def _unpack(loader):
    """The batches of a loader; raises DataError where a batch is an error or a worker died."""
    batches = iter(loader)
    reader, workers = batches._thread, getattr(batches, "_workers", ())
    pids = [worker.pid for worker in workers]
    try:
        for _ in range(len(loader)):  # not up to StopIteration, where Paddle leaves its thread
            try:
                images, labels = next(batches)
            except RuntimeError as error:
                raise _dead_worker(error) from error
            if images.ndim == 1:
                raise DataError(bytes(labels.numpy()).decode())
            yield images, labels
    finally:
        # Left to itself, an iterator that is not used up keeps its workers until this process ends.
        if not batches._shutdown:
            batches._exit_thread_expectedly()
            if workers:  # it waits for a batch, up to 5 s: this is one that it passes over
                batches._data_queue.put((_ResumeIteration(), None, None))
            reader.join(_END_SECONDS)  # Paddle would look once a second whether it has ended
        batches._try_shutdown_all(*([_END_SECONDS] if workers else []))
        _wait_for_end(reader)
        for worker in workers:  # workers ignore SIGTERM
            worker.kill()
            worker.join()
        remove_batches(pids)


def _wait_for_end(thread):
    """Waits until a thread that has ended for Python has done so for the system (on Linux).

    In between Paddle takes it off its memory statistics, under a lock.  A process that is forked in
    that moment, as a worker of the next loader, has the lock taken for good, and hangs at its first
    batch.
    """
    while not thread.is_alive() and os.path.exists(f"/proc/self/task/{thread.native_id}"):
        time.sleep(0.001)


@contextlib.contextmanager
def explain_dead_workers():
    """Turns the error that Paddle raises, wherever the main thread is, into a DataError."""
    try:
        yield
    except (SystemError, OSError) as error:
        # In Python code of a backward pass (training/cpu.py) Paddle makes an OSError of it.
        if isinstance(error, OSError) and "SystemError: (Fatal) DataLoader" not in str(error):
            raise
        raise _dead_worker(error) from error


def _dead_worker(error):
    text = str(error).rpartition("SystemError: ")[2]  # without Paddle's report of a backward pass
    reason = " ".join(text.split()).split(". ")[0][:200]
    return DataError(
        f"a loader worker died ({reason}): if the system killed it for lack of memory, take fewer "
        "-num_workers"
    )


def build_loader(dataset, sampler, num_workers, image_size, ranks_on_host=1):
    """A generator of (uint8 [batch, H, W, 3], int64 [batch]) Tensors on the current device.

    Its close(), needed where not all batches are taken, ends the workers.

    Args:
        dataset: gives (uint8 [H, W, 3], int label) for a key of the sampler.
        sampler: an EvalSampler or a TrainSampler.
        num_workers: loader processes; 0 loads in this process.
        image_size: height and width of the dataset's images.
        ranks_on_host: how many ranks share this host's memory.

    Raises:
        DataError: this system has no semaphores, or the shared memory through which workers pass
            batches is too small; while iterating, an image cannot be read.
    """
    num_workers = min(num_workers, len(sampler))  # a worker without a batch is only a cost
    if num_workers:
        require_semaphores()
        batches = num_workers * (_PREFETCH + 1) * ranks_on_host
        require_shared_memory(batches * sampler.batch_size * 3 * image_size**2)
    # Batches that are on the GPU when the loop gets them: Paddle's reader thread copies them on a
    # stream of its own, two ahead.  By default they are in pinned host memory, and the host waits
    # while the first operator copies them (paddle/io/reader.py,
    # paddle/fluid/operators/reader/buffered_reader.cc).
    paddle.io.reader.use_pinned_memory(False)
    loader = paddle.io.DataLoader(
        _Fetch(dataset),
        batch_sampler=sampler,
        collate_fn=_collate,
        num_workers=num_workers,
        worker_init_fn=functools.partial(_start_worker, os.getpid()),
        prefetch_factor=_PREFETCH,
        use_shared_memory=num_workers > 0,
    )
    return _unpack(loader)


def _start_worker(parent, worker_id):
    # Paddle's workers wait for work without looking whether their parent still lives.
    die_with_parent(parent, signal.SIGKILL)
    gc.freeze()  # otherwise its first collection writes to, and so copies, the parent's objects
    # Only the rank ends its workers, though a terminal sends Ctrl-C, and Paddle's launcher SIGTERM,
    # to the whole process group.
    for number in stop_signals():
        signal.signal(number, signal.SIG_IGN)


def require_semaphores():
    """Raises DataError where there are none, as with a /dev/shm that is read-only or missing."""
    try:
        multiprocessing.get_context("fork").Lock()
    except (ImportError, OSError) as error:
        if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
            raise
        raise DataError(
            f"the loader workers need semaphores, which live in /dev/shm: {cause(error)}: mount "
            "/dev/shm writable, or take -num_workers 0, which needs none"
        ) from error


def require_shared_memory(num_bytes, folder="/dev/shm"):
    """Raises DataError where `folder` has less than `num_bytes` free; a worker would die there."""
    if not os.path.isdir(folder):
        return
    stat = os.statvfs(folder)
    free = stat.f_bavail * stat.f_frsize
    if free < num_bytes:
        raise DataError(
            f"{folder} has {free >> 20} MB free, the loader workers need about "
            f"{(num_bytes >> 20) + 1} MB of shared memory: start the container with a larger "
            "--shm-size, or take fewer workers (-num_workers 0 needs none)"
        )
