#define EGNN_ISA avx512
#include "kernels.inc"
