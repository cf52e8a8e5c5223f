"""CUDA C++ kernels, one idea a `.cu` file, compiled at start-up by NVRTC (compiler.py) and launched through launcher.py."""
