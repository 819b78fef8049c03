"""The parts of `benchmarks/gpu.py`. Only torch, triton, numpy and microtome are imported on top."""
