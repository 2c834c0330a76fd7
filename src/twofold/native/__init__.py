"""Our kernels for CPUs: their source (`kernels.cpp`), how they are compiled (`build`) and loaded (`load`)."""
