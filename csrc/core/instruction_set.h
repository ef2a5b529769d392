// The table of kernels of the instruction set in use.
#pragma once

#include "vectorised/kernel_table.h"

namespace egnn {

template <class T>
const KernelTable<T>& kernel_table();
template <>
const KernelTable<float>& kernel_table<float>();
template <>
const KernelTable<double>& kernel_table<double>();

}  // namespace egnn
