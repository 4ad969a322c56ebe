#pragma once

#include <ATen/ATen.h>
#include <ATen/TensorIterator.h>

namespace gradnorm_kernels {

// at::parallel_for on PyTorch's own threads. The template of that name is serial where it is compiled without
// OpenMP, whose flags and runtime differ from one compiler to the next; the loop of a TensorIterator is
// compiled into PyTorch. Its elements, bytes that are neither read nor written, stand for the indices.
template <class Fn>
void parallel_for(int64_t begin, int64_t end, int64_t grain_size, const Fn& fn) {
  if (end - begin <= grain_size) {
    if (begin < end) {
      fn(begin, end);
    }
    return;
  }
  at::Tensor indices = at::empty({end - begin}, at::TensorOptions().dtype(at::kByte));
  const auto* first = static_cast<const char*>(indices.const_data_ptr());
  auto iter = at::TensorIterator::nullary_op(indices);
  iter.for_each(
      [&](char** data, const int64_t* /*strides*/, int64_t count) {
        const int64_t start = begin + (data[0] - first);
        fn(start, start + count);
      },
      grain_size);
}

}  // namespace gradnorm_kernels
