"""A machine for PTX: executes what Triton and nvcc emit, on a CPU, and checks it. See README.md."""
