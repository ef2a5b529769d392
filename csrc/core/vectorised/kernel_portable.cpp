#define EGNN_ISA portable
#include "kernels.inc"
