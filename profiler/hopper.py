"""The GPU whose kernels the predictions model: an H100 or H200."""

MULTIPROCESSORS = 132
THREADS_A_MULTIPROCESSOR = 2048
