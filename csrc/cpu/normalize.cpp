#include "normalize.h"

#include "rows.h"

namespace gradnorm_kernels::CPU_CAPABILITY {
namespace normalize {
namespace {

using at::Tensor;

enum Pass { kForward, kBackward, kDoubleBackward, kNormDoubleBackward, kWeightNormDoubleBackward };

// Of a row x with the direction y = r x, the pass that csrc/normalize.cpp derives. A first walk along the row
// takes the sums, a second one writes.
template <class T, Pass pass, size_t Operands>
void rows(const std::array<Tensor, Operands>& operands, size_t outputs, int64_t dim, double eps) {
  using P = Pack<T>;
  using Scalar = typename P::Scalar;
  using Vector = typename P::Vector;
  constexpr bool of_norm = pass == kNormDoubleBackward, of_weights = pass == kWeightNormDoubleBackward;
  constexpr bool whole = pass == kDoubleBackward || of_weights;
  constexpr bool has_v = whole || of_norm, has_g = whole || pass == kBackward;
  const auto least = static_cast<Scalar>(eps);
  const Vector r_of_short(of_norm ? Scalar(0) : 1 / least);

  for_each_row<T>(operands, outputs, dim, [&](const auto& data, const auto& row) {
    // Outputs, then the gradients that are given, of weight normalisation what has an element a row, and the
    // input.
    const T *x_row = data[Operands - 1], *v_row = data[outputs];
    const T* g_row = data[of_weights ? outputs + 1 : Operands - 2];
    SumOfParts<P> xx, gx, vx, vg;
    row.each([&](int64_t i, auto count) {
      const P x = P::load(x_row + i, count);
      xx.add(x, x);
      if constexpr (has_g) {
        gx.add(P::load(g_row + i, count), x);
      }
      if constexpr (has_v) {
        vx.add(P::load(v_row + i, count), x);
      }
      if constexpr (whole) {
        vg.add(P::load(v_row + i, count), P::load(g_row + i, count));
      }
    });

    const P norm = P::map([](const Vector& square) { return square.sqrt(); }, row.total(xx.value()));
    // NaN is not short.
    const P is_short =
        P::map([&](const Vector& n) { return of_norm ? n == Vector(0) : n < Vector(least); }, norm);
    const auto unless_short = [&](const P& value, const Vector& otherwise) {
      return P::map(
          [&](const Vector& a, const Vector& mask) { return Vector::blendv(a, otherwise, mask); }, value,
          is_short);
    };
    const P r = unless_short(P(1) / norm, r_of_short);
    const auto along_y = [&](const P& sum) { return unless_short(r * sum, Vector(0)); };
    const P g_y = along_y(row.total(gx.value())), v_y = along_y(row.total(vx.value()));
    const auto each_its_own = [&](const T* one) {
      return row.rows == 1 ? P(Scalar(one[0])) : P::load(one, row.rows);
    };

    if constexpr (of_norm) {
      const P g = each_its_own(g_row);
      v_y.store(data[0], row.rows);
      const P scale = g * r;
      row.each([&](int64_t i, auto count) {
        const P y = r * P::load(x_row + i, count);
        (scale * (P::load(v_row + i, count) - y * v_y)).store(data[1] + i, count);
      });
    } else {
      const P v_g = unless_short(row.total(vg.value()), Vector(0)), of_y = v_g - P(3) * g_y * v_y;
      P length(1), of_length;
      if constexpr (of_weights) {
        length = each_its_own(data[Operands - 2]);
        of_length = each_its_own(data[Operands - 3]);
        (r * (v_g - g_y * v_y)).store(data[2], row.rows);
      }
      row.each([&](int64_t i, auto count) {
        const P y = r * P::load(x_row + i, count);
        if constexpr (pass == kForward) {
          y.store(data[0] + i, count);
        } else if constexpr (pass == kBackward) {
          (r * (P::load(g_row + i, count) - y * g_y)).store(data[0] + i, count);
        } else {
          const P v = P::load(v_row + i, count), g = P::load(g_row + i, count);
          const P of_g = r * (v - y * v_y);
          // r is large where a row is short: it multiplies the sum, whose terms cancel.
          const P sum = fmadd(of_y, y, fmadd(g_y, v, v_y * g));
          if constexpr (of_weights) {
            fmadd(of_length, y, length * of_g).store(data[0] + i, count);
            (r * (of_length * (g - y * g_y) - length * (r * sum))).store(data[1] + i, count);
          } else {
            of_g.store(data[0] + i, count);
            ((P(0) - r) * (r * sum)).store(data[1] + i, count);
          }
        }
      });
    }
  });
}

template <Pass pass, class... Operands>
void run(size_t outputs, int64_t dim, double eps, const Operands&... operands) {
  const std::array all{operands...};
  dispatch(all[0].scalar_type(), [&](auto type) { rows<decltype(type), pass>(all, outputs, dim, eps); });
}

}  // namespace
}  // namespace normalize

const NormalizeKernels normalize_kernels{
    [](const auto& output, const auto& input, int64_t dim, double eps) {
      normalize::run<normalize::kForward>(1, dim, eps, output, input);
    },
    [](const auto& grad_input, const auto& grad_output, const auto& input, int64_t dim, double eps) {
      normalize::run<normalize::kBackward>(1, dim, eps, grad_input, grad_output, input);
    },
    [](const auto& grad_grad_output, const auto& grad_input, const auto& grad_grad_input,
       const auto& grad_output, const auto& input, int64_t dim, double eps) {
      normalize::run<normalize::kDoubleBackward>(
          2, dim, eps, grad_grad_output, grad_input, grad_grad_input, grad_output, input);
    },
    [](const auto& grad_grad_output, const auto& grad_input, const auto& grad_grad_input,
       const auto& grad_output, const auto& input, int64_t dim) {
      normalize::run<normalize::kNormDoubleBackward>(
          2, dim, /*eps=*/0, grad_grad_output, grad_input, grad_grad_input, grad_output, input);
    },
    [](const auto& grad_grad_output, const auto& grad_v, const auto& grad_g, const auto& grad_grad_v,
       const auto& grad_output, const auto& grad_grad_g, const auto& g, const auto& v, int64_t dim) {
      normalize::run<normalize::kWeightNormDoubleBackward>(
          3, dim, /*eps=*/-1, grad_grad_output, grad_v, grad_g, grad_grad_v, grad_output, grad_grad_g, g, v);
    }};

}  // namespace gradnorm_kernels::CPU_CAPABILITY
