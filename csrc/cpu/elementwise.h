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
      std::array<char*, operands> data;
      std::copy_n(base, operands, data.begin());
      const bool contiguous =
          std::all_of(strides, strides + operands, [](int64_t stride) { return stride == sizeof(T); });
      const auto element = [&](size_t k, int64_t i) {
        return reinterpret_cast<T*>(data[k] + i * strides[k]);
      };
      std::array<P, Inputs> in;
      std::array<P, Outputs> out;
      const auto apply = [&](size_t part) C10_ALWAYS_INLINE_ATTRIBUTE {
        set_part(out, part, local_fn(part_of(in, part)));
      };
      int64_t start = 0;
      for (; contiguous && start + P::size <= n; start += P::size) {
        for (size_t k = 0; k < Inputs; ++k) {
          in[k] = P::load(reinterpret_cast<const T*>(data[Outputs + k]) + start, P::size);
        }
        P::for_each_part(apply);
        for (size_t k = 0; k < Outputs; ++k) {
          out[k].store(reinterpret_cast<T*>(data[k]) + start, P::size);
        }
      }
      for (; start < n; start += P::size) {
        const int64_t count = std::min(P::size, n - start);
        T buffer[P::size] = {};
        for (size_t k = 0; k < Inputs; ++k) {
          for (int64_t i = 0; i < count; ++i) {
            buffer[i] = *element(Outputs + k, start + i);
          }
          in[k] = P::load(buffer, P::size);
        }
        P::for_each_part(apply);
        for (size_t k = 0; k < Outputs; ++k) {
          out[k].store(buffer, P::size);
          for (int64_t i = 0; i < count; ++i) {
            *element(k, start + i) = buffer[i];
          }
        }
      }
    });
  });
}

}  // namespace gradnorm_kernels::CPU_CAPABILITY
