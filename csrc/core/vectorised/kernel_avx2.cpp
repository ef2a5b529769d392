#define EGNN_ISA avx2
#include "kernels.inc"
