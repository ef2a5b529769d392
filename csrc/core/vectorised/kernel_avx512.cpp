// The kernels for AVX-512.
#define EGNN_ISA avx512
#include "kernels.inc"
