// One vectorised loop for every elementwise CPU kernel, of any number of inputs and outputs.
#pragma once

#include <ATen/TensorIterator.h>

#include "pack.h"

namespace gradnorm_kernels::CPU_CAPABILITY {

// fn makes of an array of vectors, of the inputs, one of the outputs.
//
// Strided operands, and what is left of a row after its last whole vector, pass through a vector's worth of
// stack memory: the same instructions compute them, and give the same bits.
template <size_t Outputs, size_t Inputs, class Fn>
void elementwise(at::TensorIteratorBase& iter, const Fn& fn) {
  constexpr size_t operands = Outputs + Inputs;
  dispatch(iter.common_dtype(), [&](auto type) {
    using T = decltype(type);
    using P = Pack<T>;
    iter.for_each([&](char** base, const int64_t* strides, int64_t n) {
      // Copies, which live in registers: for all the compiler knows, a store may change the originals.
      const Fn local_fn = fn;
      std::array<T*, operands> data;
      std::transform(
          base, base + operands, data.begin(), [](char* first) { return reinterpret_cast<T*>(first); });
      const bool contiguous =
          std::all_of(strides, strides + operands, [](int64_t stride) { return stride == sizeof(T); });
      std::array<P, Inputs> in;
      std::array<P, Outputs> out;
      const auto apply = [&]() C10_ALWAYS_INLINE_ATTRIBUTE {
        P::for_each_part([&](size_t k)
                             C10_ALWAYS_INLINE_ATTRIBUTE { set_part(out, k, local_fn(part_of(in, k))); });
      };
      int64_t start = 0;
      for (; contiguous && start + P::size <= n; start += P::size) {
        for (size_t k = 0; k < Inputs; ++k) {
          in[k] = P::load(data[Outputs + k] + start, P::size);
        }
        apply();
        for (size_t k = 0; k < Outputs; ++k) {
          out[k].store(data[k] + start, P::size);
        }
      }
      for (; start < n; start += P::size) {
        const int64_t count = std::min(P::size, n - start);
        const auto element = [&](size_t k, int64_t i) -> T& {
          return *reinterpret_cast<T*>(base[k] + (start + i) * strides[k]);
        };
        T buffer[P::size] = {};
        for (size_t k = 0; k < Inputs; ++k) {
          for (int64_t i = 0; i < count; ++i) {
            buffer[i] = element(Outputs + k, i);
          }
          in[k] = P::load(buffer, P::size);
        }
        apply();
        for (size_t k = 0; k < Outputs; ++k) {
          out[k].store(buffer, P::size);
          for (int64_t i = 0; i < count; ++i) {
            element(k, i) = buffer[i];
          }
        }
      }
    });
  });
}

}  // namespace gradnorm_kernels::CPU_CAPABILITY
