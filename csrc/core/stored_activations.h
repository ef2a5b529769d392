// What a layer's forward stores for its backward, so that it is not computed again.
#pragma once

#include "args.h"
#include "packing.h"

namespace egnn {

// Offsets in the memory: which kernels wrote it; P and Q; then the results of those linears of
// phi_h, phi_v, phi_e and phi_x that an activation follows. Rows are padded to ld, and each array
// is followed by kSpareRows rows.
template <class T>
struct ActivationOffsets {
  int64_t pq, z_h, z_v, z2, z3, size;

  ActivationOffsets(int64_t nodes, int64_t edges, int64_t ld, bool velocity, bool head) {
    const auto rows = [&](int64_t count, int64_t width) {
      return aligned_size((count + kSpareRows) * width * sizeof(T)) /
             static_cast<int64_t>(sizeof(T));
    };
    pq = aligned_size(sizeof(uintptr_t)) / static_cast<int64_t>(sizeof(T));
    z_h = pq + rows(nodes, 2 * ld);
    z_v = z_h + rows(nodes, ld);
    z2 = z_v + (velocity ? rows(nodes, ld) : 0);
    z3 = z2 + rows(edges, ld);
    size = z3 + (head ? rows(edges, ld) : 0);
  }
};

// Marks the memory, if there is any, with the kernels that write it: ld differs between
// instruction sets. The address of a table of kernels identifies them.
template <class T>
void mark_activations(const LayerArgs& a, const KernelTable<T>& kernels) {
  if (a.constants.activations == 0) return;
  *output<uintptr_t>(a.constants.activations) = reinterpret_cast<uintptr_t>(&kernels);
}

// Whether there are activations, and these kernels wrote them.
template <class T>
bool has_activations(const LayerArgs& a, const KernelTable<T>& kernels) {
  return a.constants.activations != 0 &&
         *input<uintptr_t>(a.constants.activations) == reinterpret_cast<uintptr_t>(&kernels);
}

// Lets the kernels write or read activations.
template <class T>
void use_activations(const LayerArgs& a, Problem<T>& p, NodeProblem<T>& n) {
  const ActivationOffsets<T> at(n.nodes, p.edges, p.ld, n.velocity, p.head);
  T* memory = output<T>(a.constants.activations);
  n.pq = memory + at.pq;
  n.z_h = memory + at.z_h;
  n.z_v = n.velocity ? memory + at.z_v : nullptr;
  p.z2 = memory + at.z2;
  p.z3 = p.head ? memory + at.z3 : nullptr;
}

}  // namespace egnn
