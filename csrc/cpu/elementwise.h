// One vectorised loop for every elementwise CPU kernel, of any number of inputs and outputs.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/TensorIterator.h>
#include <ATen/cpu/vec/functional.h>

#include <algorithm>
#include <array>
#include <tuple>

namespace gradnorm_kernels {
namespace CPU_CAPABILITY {

template <class T, size_t N>
using Vectors = std::array<at::vec::Vectorized<T>, N>;

// Applies fn : Vectors<opmath_t, Inputs> -> Vectors<opmath_t, Outputs> to one vector of T.
template <size_t Outputs, class T, size_t Inputs, class Fn>
Vectors<T, Outputs> apply_in_opmath(const Vectors<T, Inputs>& in, const Fn& fn) {
  if constexpr (c10::is_reduced_floating_point_v<T>) {
    Vectors<float, Inputs> low, high;
    for (size_t k = 0; k < Inputs; ++k) {
      std::tie(low[k], high[k]) = at::vec::convert_to_float<T>(in[k]);
    }
    const Vectors<float, Outputs> out_low = fn(low), out_high = fn(high);
    Vectors<T, Outputs> out;
    for (size_t k = 0; k < Outputs; ++k) {
      out[k] = at::vec::convert_from_float<T>(out_low[k], out_high[k]);
    }
    return out;
  } else {
    return fn(in);
  }
}

// Strided operands, and what is left of a row after its last whole vector, pass through a vector's worth of
// stack memory: the same instructions compute them, and give the same bits.
template <class T, size_t Outputs, size_t Inputs, class Fn>
void run(at::TensorIteratorBase& iter, const Fn& fn) {
  using Vec = at::vec::Vectorized<T>;
  constexpr size_t operands = Outputs + Inputs;
  constexpr int64_t width = Vec::size();
  iter.for_each([&](char** base, const int64_t* strides, int64_t n) {
    // Copies, which live in registers: for all the compiler knows, a store may change the originals.
    const Fn local_fn = fn;
    std::array<char*, operands> data;
    std::copy_n(base, operands, data.begin());
    const bool contiguous =
        std::all_of(strides, strides + operands, [](int64_t stride) { return stride == sizeof(T); });
    const auto element = [&](size_t k, int64_t i) { return reinterpret_cast<T*>(data[k] + i * strides[k]); };
    Vectors<T, Inputs> in;
    int64_t start = 0;
    for (; contiguous && start + width <= n; start += width) {
      for (size_t k = 0; k < Inputs; ++k) {
        in[k] = Vec::loadu(reinterpret_cast<const T*>(data[Outputs + k]) + start);
      }
      const auto out = apply_in_opmath<Outputs, T, Inputs>(in, local_fn);
      for (size_t k = 0; k < Outputs; ++k) {
        out[k].store(reinterpret_cast<T*>(data[k]) + start);
      }
    }
    for (; start < n; start += width) {
      const int64_t count = std::min(width, n - start);
      T buffer[width] = {};
      for (size_t k = 0; k < Inputs; ++k) {
        for (int64_t i = 0; i < count; ++i) {
          buffer[i] = *element(Outputs + k, start + i);
        }
        in[k] = Vec::loadu(buffer);
      }
      const auto out = apply_in_opmath<Outputs, T, Inputs>(in, local_fn);
      for (size_t k = 0; k < Outputs; ++k) {
        out[k].store(buffer);
        for (int64_t i = 0; i < count; ++i) {
          *element(k, start + i) = buffer[i];
        }
      }
    }
  });
}

template <size_t Outputs, size_t Inputs, class Fn>
void elementwise(at::TensorIteratorBase& iter, const Fn& fn) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, iter.common_dtype(), "elementwise", [&] {
    run<scalar_t, Outputs, Inputs>(iter, fn);
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace gradnorm_kernels
