"""Settings of the whole test run."""

import os

# Before torch is imported anywhere: the models are tiny, and a second thread only waits for its turn on a busy core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
