"""The experts' kernels and the thread pool in C++ (`src/`), and how Python reaches them."""
