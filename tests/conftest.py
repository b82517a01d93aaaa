"""Fixtures and paths that several test files use."""

import os
import sys
from pathlib import Path

# Before Paddle is imported: it reads the variable once, and takes one thread where it is unset.
os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
