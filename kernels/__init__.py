"""Pure tensor functions: one operation a file, its PyTorch reference and, where it pays, a Triton kernel beside it."""
