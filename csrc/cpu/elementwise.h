// One vectorised loop for every elementwise CPU kernel, of any number of inputs and outputs.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/TensorIterator.h>
#include <ATen/cpu/vec/functional.h>

#include <algorithm>
#include <array>

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

// Strided operands pass through a vector's worth of stack memory, so that they are computed by the same
// instructions as contiguous ones and give the same bits.
template <class T, size_t Outputs, size_t Inputs, class Fn>
void run(at::TensorIteratorBase& iter, const Fn& fn) {
  using Vec = at::vec::Vectorized<T>;
  constexpr int64_t width = Vec::size();
  iter.for_each([&](char** data, const int64_t* strides, int64_t n) {
    const auto contiguous = [&](size_t k) { return strides[k] == static_cast<int64_t>(sizeof(T)); };
    const auto element = [&](size_t k, int64_t i) {
      return reinterpret_cast<T*>(data[k] + i * strides[k]);
    };
    const auto load = [&](size_t k, int64_t start, int64_t count) {
      if (contiguous(k)) {
        return count == width ? Vec::loadu(element(k, start)) : Vec::loadu(element(k, start), count);
      }
      T gathered[width];
      for (int64_t i = 0; i < count; ++i) {
        gathered[i] = *element(k, start + i);
      }
      return Vec::loadu(gathered, count);
    };
    const auto store = [&](const Vec& value, size_t k, int64_t start, int64_t count) {
      if (contiguous(k)) {
        value.store(element(k, start), count);
        return;
      }
      T scattered[width];
      value.store(scattered);
      for (int64_t i = 0; i < count; ++i) {
        *element(k, start + i) = scattered[i];
      }
    };
    for (int64_t start = 0; start < n; start += width) {
      const int64_t count = std::min(width, n - start);
      Vectors<T, Inputs> in;
      for (size_t k = 0; k < Inputs; ++k) {
        in[k] = load(Outputs + k, start, count);
      }
      const auto out = apply_in_opmath<Outputs, T, Inputs>(in, fn);
      for (size_t k = 0; k < Outputs; ++k) {
        store(out[k], k, start, count);
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
