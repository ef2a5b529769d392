// Which instruction set's kernels run.
#pragma once

#include "vectorised/problem.h"

namespace egnn {

template <class T>
const KernelTable<T>& kernel_table();
template <>
const KernelTable<float>& kernel_table<float>();
template <>
const KernelTable<double>& kernel_table<double>();

}  // namespace egnn
