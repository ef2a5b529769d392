// The kernels for SSE2 or NEON, which every machine has.
#define EGNN_ISA portable
#include "kernels.inc"
