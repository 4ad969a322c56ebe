#include "softmax.h"

#include <limits>
#include <vector>

#include "../elementary.h"
#include "rows.h"

namespace gradnorm_kernels::CPU_CAPABILITY {
namespace softmax {
namespace {

using at::Tensor;

template <class T, bool has_bias>
void forward_rows(const Tensor& output, const Tensor& input, const Tensor& bias) {
  using P = Pack<T>;
  using Scalar = typename P::Scalar;
  std::array<Tensor, 2 + has_bias> operands{output, input};
  if constexpr (has_bias) {
    operands[2] = bias;
  }
  constexpr Scalar lowest = -std::numeric_limits<Scalar>::infinity();

  for_each_row<T>(operands, 1, std::max<int64_t>(input.dim() - 1, 0), [&](const auto& data, Along<T> row) {
    // The row's sums, then their exponentials, in whole packs of the dtype of the arithmetic.
    thread_local std::vector<Scalar> buffer;
    buffer.resize((row.n + P::size - 1) / P::size * P::size);
    Scalar* const scratch = buffer.data();

    P largest(lowest);
    row.each([&](int64_t i, auto count) {
      P x = P::load(data[1] + i, count);
      if constexpr (has_bias) {
        x = x + P::load(data[2] + i, count);
      }
      x = x.first(count, lowest);
      largest = maximum(largest, x);
      x.store(scratch + i, P::size);
    });
    const P shift(largest.max());
    SumOfParts<P> sum;
    row.each([&](int64_t i, int64_t) {
      const P x = P::load(scratch + i, P::size) - shift;
      const P exponential = P::map([](const auto& part) { return exp_nonpositive(part); }, x);
      sum.add(exponential);
      exponential.store(scratch + i, P::size);
    });
    const P scale = P(1) / row.total(sum.value());
    row.each(
        [&](int64_t i, auto count) { (P::load(scratch + i, P::size) * scale).store(data[0] + i, count); });
  });
}

template <class T, bool to_input>
void double_backward_rows(
    const Tensor& grad_grad_output, const Tensor& grad, const Tensor& grad_grad_input,
    const Tensor& grad_output, const Tensor& output, int64_t dim) {
  using P = Pack<T>;
  const std::array operands{grad_grad_output, grad, grad_grad_input, grad_output, output};
  for_each_row<T>(operands, 2, dim, [](const auto& data, const auto& row) {
    T *grad_g_row = data[0], *grad_row = data[1];
    const T *v_row = data[2], *g_row = data[3], *y_row = data[4];
    SumOfParts<P> of_v, of_g, of_product;
    row.each([&](int64_t i, auto count) {
      const P y = P::load(y_row + i, count);
      of_v.add(P::load(v_row + i, count), y);
      of_g.add(P::load(g_row + i, count), y);
    });
    const P v_mean = row.total(of_v.value()), g_mean = row.total(of_g.value());
    if constexpr (to_input) {
      row.each([&](int64_t i, auto count) {
        const P v_centred = P::load(v_row + i, count) - v_mean;
        of_product.add(P::load(y_row + i, count), v_centred * (P::load(g_row + i, count) - g_mean));
      });
    }
    const P product_mean = to_input ? row.total(of_product.value()) : P();
    row.each([&](int64_t i, auto count) {
      const P v = P::load(v_row + i, count), g = P::load(g_row + i, count), y = P::load(y_row + i, count);
      const P v_centred = v - v_mean, g_centred = g - g_mean;
      (y * v_centred).store(grad_g_row + i, count);
      if constexpr (to_input) {
        (y * (v_centred * g_centred - product_mean)).store(grad_row + i, count);
      } else {
        (v * g_centred - v_mean * g).store(grad_row + i, count);
      }
    });
  });
}

template <class T, bool to_input>
void log_double_backward_rows(
    const Tensor& grad_grad_output, const Tensor& grad, const Tensor& grad_grad_input,
    const Tensor& grad_output, const Tensor& output, int64_t dim) {
  using P = Pack<T>;
  const auto exponential = [](const P& y) {
    return P::map([](const auto& part) { return exp_nonpositive(part); }, y);
  };
  const std::array operands{grad_grad_output, grad, grad_grad_input, grad_output, output};
  for_each_row<T>(operands, 2, dim, [&](const auto& data, const auto& row) {
    T *grad_g_row = data[0], *grad_row = data[1];
    const T *v_row = data[2], *g_row = data[3], *y_row = data[4];
    SumOfParts<P> of_v, of_g;
    row.each([&](int64_t i, auto count) {
      of_v.add(P::load(v_row + i, count), exponential(P::load(y_row + i, count)));
      of_g.add(P::load(g_row + i, count));
    });
    const P v_mean = row.total(of_v.value()), g_sum = row.total(of_g.value());
    row.each([&](int64_t i, auto count) {
      const P v = P::load(v_row + i, count), p = exponential(P::load(y_row + i, count));
      const P v_centred = v - v_mean;
      v_centred.store(grad_g_row + i, count);
      (P(0) - g_sum * p * (to_input ? v_centred : v)).store(grad_row + i, count);
    });
  });
}

void forward(const Tensor& output, const Tensor& input, const Tensor& bias) {
  dispatch(input.scalar_type(), [&](auto type) {
    using T = decltype(type);
    (bias.defined() ? forward_rows<T, true> : forward_rows<T, false>)(output, input, bias);
  });
}

void double_backward(
    const Tensor& grad_grad_output, const Tensor& grad, const Tensor& grad_grad_input,
    const Tensor& grad_output, const Tensor& output, int64_t dim, bool to_input, bool log) {
  dispatch(output.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto rows =
        log ? (to_input ? log_double_backward_rows<T, true> : log_double_backward_rows<T, false>)
            : (to_input ? double_backward_rows<T, true> : double_backward_rows<T, false>);
    rows(grad_grad_output, grad, grad_grad_input, grad_output, output, dim);
  });
}

}  // namespace
}  // namespace softmax

const SoftmaxKernels softmax_kernels{softmax::forward, softmax::double_backward};

}  // namespace gradnorm_kernels::CPU_CAPABILITY
