#include "softmax.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/TensorIterator.h>
#include <ATen/cpu/vec/functional.h>
#include <c10/util/accumulate.h>

#include <algorithm>
#include <array>
#include <limits>
#include <type_traits>
#include <vector>

#include "../elementary.h"

namespace gradnorm_kernels::CPU_CAPABILITY {
namespace {

using at::Tensor;

// One vector of T, in the dtype of its arithmetic: two vectors of float for a half type.
template <class T>
struct Wide {
  using Scalar = at::opmath_type<T>;
  using Part = at::vec::Vectorized<Scalar>;
  static constexpr int64_t width = at::vec::Vectorized<T>::size();
  static constexpr size_t count = width / Part::size();
  std::array<Part, count> parts;

  // What lies beyond the first `lanes` elements is 0.
  static Wide load(const T* data, int64_t lanes) {
    const auto values = at::vec::Vectorized<T>::loadu(data, lanes);
    if constexpr (count == 2) {
      const auto [low, high] = at::vec::convert_to_float<T>(values);
      return {low, high};
    } else {
      return {values};
    }
  }
  void store(T* data, int64_t lanes) const {
    if constexpr (count == 2) {
      at::vec::convert_from_float<T>(parts[0], parts[1]).store(data, lanes);
    } else {
      parts[0].store(data, lanes);
    }
  }
  static Wide load_arithmetic(const Scalar* data) {
    return map([&](size_t k) { return Part::loadu(data + k * Part::size()); });
  }
  void store_arithmetic(Scalar* data) const {
    for (size_t k = 0; k < count; ++k) {
      parts[k].store(data + k * Part::size());
    }
  }
  static Wide all(Scalar value) {
    return map([&](size_t) { return Part(value); });
  }
  template <class Fn>
  static Wide map(const Fn& fn) {
    Wide result;
    for (size_t k = 0; k < count; ++k) {
      result.parts[k] = fn(k);
    }
    return result;
  }
  // fn reduces two vectors to one.
  template <class Fn>
  Scalar reduce(const Fn& fn) const {
    Part all = parts[0];
    for (size_t k = 1; k < count; ++k) {
      all = fn(all, parts[k]);
    }
    return at::vec::vec_reduce_all<Scalar>(fn, all);
  }

  friend Wide operator+(const Wide& a, const Wide& b) {
    return map([&](size_t k) { return a.parts[k] + b.parts[k]; });
  }
  friend Wide operator-(const Wide& a, const Wide& b) {
    return map([&](size_t k) { return a.parts[k] - b.parts[k]; });
  }
  friend Wide operator*(const Wide& a, const Wide& b) {
    return map([&](size_t k) { return a.parts[k] * b.parts[k]; });
  }
  friend Wide operator/(const Wide& a, const Wide& b) {
    return map([&](size_t k) { return a.parts[k] / b.parts[k]; });
  }
};

// Visits a row whose elements are neighbours: vector by vector, the last of which may be partly filled.
template <class T>
struct Along {
  int64_t n;

  // fn(offset, lanes)
  template <class Fn>
  void each(const Fn& fn) const {
    constexpr int64_t width = Wide<T>::width;
    int64_t offset = 0;
    for (; offset + width <= n; offset += width) {
      fn(offset, width);
    }
    if (offset < n) {
      fn(offset, n - offset);
    }
  }
  // In every lane the sum of all.
  static Wide<T> total(const Wide<T>& sums) {
    return Wide<T>::all(sums.reduce([](const auto& a, const auto& b) { return a + b; }));
  }
};

// Visits as many neighbouring rows as a vector has lanes, whose elements lie `stride` apart.
template <class T>
struct Across {
  int64_t n, stride, lanes;

  template <class Fn>
  void each(const Fn& fn) const {
    for (int64_t i = 0; i < n; ++i) {
      fn(i * stride, lanes);
    }
  }
  static const Wide<T>& total(const Wide<T>& sums) {
    return sums;
  }
};

// Calls fn(pointers to the operands' first elements, Along or Across) for every row along dim, or vector of
// rows, on all of PyTorch's threads. The operands, outputs first, have one shape and contiguous rows.
template <class T, size_t Operands, class Fn>
void for_each_row(const std::array<Tensor, Operands>& operands, size_t outputs, int64_t dim, const Fn& fn) {
  if (operands[0].numel() == 0) {
    return;
  }
  const bool scalar = operands[0].dim() == 0;
  const int64_t n = scalar ? 1 : operands[0].size(dim);
  // Not the stride of dim, which says nothing where its size is 1.
  const int64_t inner = scalar ? 1 : c10::multiply_integers(operands[0].sizes().slice(dim + 1));

  // The iterator's elements are the rows, each one by its first element.
  at::TensorIteratorConfig config;
  for (size_t k = 0; k < Operands; ++k) {
    const Tensor first = scalar ? operands[k] : operands[k].select(dim, 0);
    k < outputs ? config.add_owned_output(first) : config.add_owned_const_input(first);
  }
  auto iter = config.build();
  const auto loop = [&](char** data, const int64_t* strides, int64_t count) {
    const auto rows_from = [&](int64_t i) {
      std::array<T*, Operands> rows;
      for (size_t k = 0; k < Operands; ++k) {
        rows[k] = reinterpret_cast<T*>(data[k] + i * strides[k]);
      }
      return rows;
    };
    if (inner == 1) {
      for (int64_t i = 0; i < count; ++i) {
        fn(rows_from(i), Along<T>{n});
      }
    } else if constexpr (std::is_invocable_v<Fn, std::array<T*, Operands>, Across<T>>) {
      const bool neighbours =
          std::all_of(strides, strides + Operands, [](int64_t stride) { return stride == sizeof(T); });
      const int64_t width = neighbours ? Wide<T>::width : 1;
      for (int64_t i = 0; i < count; i += width) {
        fn(rows_from(i), Across<T>{n, inner, std::min(width, count - i)});
      }
    }
  };
  iter.for_each(loop, std::max<int64_t>(1, at::internal::GRAIN_SIZE / n));
}

template <class T, bool has_bias>
void forward_rows(const Tensor& output, const Tensor& input, const Tensor& bias) {
  using W = Wide<T>;
  using Scalar = typename W::Scalar;
  using Part = typename W::Part;
  std::array<Tensor, 2 + has_bias> operands{output, input};
  if constexpr (has_bias) {
    operands[2] = bias;
  }
  const auto maximum = [](const auto& a, const auto& b) { return at::vec::maximum(a, b); };
  constexpr Scalar lowest = -std::numeric_limits<Scalar>::infinity();

  for_each_row<T>(operands, 1, std::max<int64_t>(input.dim() - 1, 0), [&](const auto& data, Along<T> row) {
    // The row's sums, then their exponentials, in the dtype of the arithmetic.
    thread_local std::vector<Scalar> buffer;
    buffer.resize((row.n + W::width - 1) / W::width * W::width);
    Scalar* const scratch = buffer.data();

    W largest = W::all(lowest);
    row.each([&](int64_t i, int64_t lanes) {
      W x = W::load(data[1] + i, lanes);
      if constexpr (has_bias) {
        x = x + W::load(data[2] + i, lanes);
      }
      if (lanes < W::width) {
        x = W::map([&](size_t k) {
          constexpr int64_t size = Part::size();
          return Part::set(Part(lowest), x.parts[k], std::clamp<int64_t>(lanes - k * size, 0, size));
        });
      }
      largest = W::map([&](size_t k) { return maximum(largest.parts[k], x.parts[k]); });
      x.store_arithmetic(scratch + i);
    });
    const Part shift(largest.reduce(maximum));
    W sum = W::all(0);
    row.each([&](int64_t i, int64_t) {
      const W x = W::load_arithmetic(scratch + i);
      const W exponential = W::map([&](size_t k) { return exp_nonpositive(x.parts[k] - shift); });
      sum = sum + exponential;
      exponential.store_arithmetic(scratch + i);
    });
    const W scale = W::all(1) / row.total(sum);
    row.each([&](int64_t i, int64_t lanes) {
      (W::load_arithmetic(scratch + i) * scale).store(data[0] + i, lanes);
    });
  });
}

template <class T, bool to_input>
void double_backward_rows(
    const Tensor& grad_grad_output, const Tensor& grad, const Tensor& grad_grad_input,
    const Tensor& grad_output, const Tensor& output, int64_t dim) {
  using W = Wide<T>;
  const std::array operands{grad_grad_output, grad, grad_grad_input, grad_output, output};
  for_each_row<T>(operands, 2, dim, [](const auto& data, const auto& row) {
    T *grad_g_row = data[0], *grad_row = data[1];
    const T *v_row = data[2], *g_row = data[3], *y_row = data[4];
    W v_mean = W::all(0), g_mean = W::all(0);
    row.each([&](int64_t i, int64_t lanes) {
      const W y = W::load(y_row + i, lanes);
      v_mean = v_mean + W::load(v_row + i, lanes) * y;
      g_mean = g_mean + W::load(g_row + i, lanes) * y;
    });
    v_mean = row.total(v_mean);
    g_mean = row.total(g_mean);
    W product_mean = W::all(0);
    if constexpr (to_input) {
      row.each([&](int64_t i, int64_t lanes) {
        const W product = (W::load(v_row + i, lanes) - v_mean) * (W::load(g_row + i, lanes) - g_mean);
        product_mean = product_mean + W::load(y_row + i, lanes) * product;
      });
      product_mean = row.total(product_mean);
    }
    row.each([&](int64_t i, int64_t lanes) {
      const W v = W::load(v_row + i, lanes), g = W::load(g_row + i, lanes), y = W::load(y_row + i, lanes);
      const W v_centred = v - v_mean, g_centred = g - g_mean;
      (y * v_centred).store(grad_g_row + i, lanes);
      if constexpr (to_input) {
        (y * (v_centred * g_centred - product_mean)).store(grad_row + i, lanes);
      } else {
        (v * g_centred - v_mean * g).store(grad_row + i, lanes);
      }
    });
  });
}

// Instantiates body for the dtype of a tensor.
#define DISPATCH(tensor, body) \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, (tensor).scalar_type(), "softmax", body)

void forward(const Tensor& output, const Tensor& input, const Tensor& bias) {
  DISPATCH(input, [&] {
    (bias.defined() ? forward_rows<scalar_t, true> : forward_rows<scalar_t, false>)(output, input, bias);
  });
}

void double_backward(
    const Tensor& grad_grad_output, const Tensor& grad, const Tensor& grad_grad_input,
    const Tensor& grad_output, const Tensor& output, int64_t dim, bool to_input) {
  DISPATCH(output, [&] {
    (to_input ? double_backward_rows<scalar_t, true>
              : double_backward_rows<scalar_t, false>)(grad_grad_output, grad, grad_grad_input, grad_output,
                                                       output, dim);
  });
}

}  // namespace

const SoftmaxKernels softmax_kernels{forward, double_backward};

}  // namespace gradnorm_kernels::CPU_CAPABILITY
