"""The fused Triton kernels, how they are launched, and the operators that torch sees."""
