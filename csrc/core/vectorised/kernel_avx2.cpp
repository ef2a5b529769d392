// The kernels for AVX2.
#define EGNN_ISA avx2
#include "kernels.inc"
