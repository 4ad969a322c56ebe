#include "cross_entropy.h"

#include <cmath>
#include <limits>

#include "../elementary.h"
#include "buffer.h"
#include "rows.h"

namespace gradnorm_kernels::CPU_CAPABILITY {
namespace cross_entropy {
namespace {

using at::Tensor;

enum Order { kForward, kBackward, kDoubleBackward };

// Of a row x of logits with the softmax p and the target q, whose sum is Q: the loss Q log sum(e^x) - <q, x>
// of x shifted by its maximum; its gradient g (Q p - q); and of that one's gradient v the gradients
// Q <p, v> - <q, v> of g and g Q p (v - <p, v>) of x. Here q = keep t + floor, with t the target before it
// was smoothed. A first walk along the row takes the maximum, a second the sums, a third writes. Of
// exponentials that are few enough for the cache, the third has those of the second.
template <class T, Order order, bool soft, size_t Operands>
void rows(const std::array<Tensor, Operands>& operands, size_t outputs, const CrossEntropy& of) {
  using P = Pack<T>;
  using Scalar = typename P::Scalar;
  constexpr Scalar lowest = -std::numeric_limits<Scalar>::infinity();
  const int64_t classes = of.input.size(of.dim);
  const auto smoothing = static_cast<Scalar>(of.label_smoothing);
  const Scalar keep = 1 - smoothing, floor = smoothing / static_cast<Scalar>(classes);
  const auto exponential = [](const P& x) {
    return P::map([](const auto& part) { return exp_nonpositive(part); }, x);
  };

  for_each_row<T>(operands, outputs, of.dim, [&](const auto& data, const auto& row) {
    // Outputs, then the gradients that are given, input and target.
    const T *x_row = data[Operands - 2], *t_row = data[Operands - 1];
    const T *g_rows = data[Operands - 3], *v_row = data[outputs];
    const auto* const labels = reinterpret_cast<const int64_t*>(t_row);
    const auto load_x = [&](int64_t i, auto count) { return P::load(x_row + i, count).first(count, lowest); };

    constexpr int64_t most_kept = 1 << 16;
    const int64_t exponentials = row.packs() * P::size;
    Scalar* const kept =
        order != kForward && exponentials <= most_kept ? thread_scratch<Scalar>(exponentials) : nullptr;
    int64_t pack = 0;

    P largest(lowest);
    row.each([&](int64_t i, auto count) { largest = maximum(largest, load_x(i, count)); });
    largest = row.largest(largest);
    // u is what q is multiplied with: the shifted logits, or v.
    P e_sum, u_sum, eu_sum;
    // Of probabilities, whose terms may cancel.
    SumOfParts<P> t_terms, tu_terms;
    row.each([&](int64_t i, auto count) {
      const P shifted = load_x(i, count) - largest, e = exponential(shifted);
      e_sum = e_sum + e;
      if (kept) {
        e.store(kept + P::size * pack++, P::size);
      }
      P u;
      if constexpr (order != kBackward) {
        u = order == kForward ? shifted.first(count, 0) : P::load(v_row + i, count);
        u_sum = u_sum + u;
        eu_sum = fmadd(e, u, eu_sum);
      }
      if constexpr (soft) {
        const P t = P::load(t_row + i, count);
        t_terms.add(t);
        tu_terms.add(t, u);
      }
    });

    // Of each row, where several are visited together.
    using Lanes = std::array<Scalar, P::size>;
    const auto lanes = [](const P& pack) {
      Lanes values;
      pack.store(values.data(), P::size);
      return values;
    };
    const Lanes e = lanes(row.total(e_sum)), t = lanes(row.total(t_terms.value())),
                u = lanes(row.total(u_sum)), tu = lanes(row.total(tu_terms.value())),
                eu = lanes(row.total(eu_sum)), shift = lanes(largest);
    Lanes g{}, of_e{};  // grad_output, and what makes Q p of e^x
    const auto is_ignored = [&](int64_t r) { return !soft && labels[r] == of.ignore_index; };
    const auto labelled = [&](int64_t r) { return labels[r] * row.stride + r; };
    for (int64_t r = 0; r < row.rows; ++r) {
      if (is_ignored(r)) {
        if constexpr (order != kBackward) {
          data[0][r] = T(Scalar(0));
        }
        continue;
      }
      const Scalar mass = soft ? keep * t[r] + smoothing : 1;
      Scalar of_target = tu[r];
      if constexpr (!soft) {
        TORCH_CHECK_INDEX(0 <= labels[r] && labels[r] < classes, "Target ", labels[r], " is out of bounds.");
        of_target = order == kForward    ? x_row[labelled(r)] - shift[r]
                    : order == kBackward ? 0
                                         : Scalar(v_row[labelled(r)]);
      }
      // Written out, since of two products the compiler makes now one, now the other part of a multiply-add.
      const Scalar linear = std::fma(keep, of_target, floor == 0 ? Scalar(0) : floor * u[r]);
      if constexpr (order == kForward) {
        data[0][r] = mass * std::log(e[r]) - linear;
      } else {
        g[r] = g_rows[r];
        of_e[r] = mass / e[r];
      }
      if constexpr (order == kDoubleBackward) {
        data[0][r] = mass * (eu[r] / e[r]) - linear;
      }
    }
    if constexpr (order != kForward) {
      T* const grad_row = data[outputs - 1];
      const P g_pack = row.each_its_own(g.data()), of_e_pack = row.each_its_own(of_e.data());
      const P v_mean = row.total(eu_sum) / row.total(e_sum);
      pack = 0;
      row.each([&](int64_t i, auto count) {
        const P e =
            kept ? P::load(kept + P::size * pack++, P::size) : exponential(load_x(i, count) - largest);
        if constexpr (order == kDoubleBackward) {
          (g_pack * (of_e_pack * e) * (P::load(v_row + i, count) - v_mean)).store(grad_row + i, count);
        } else {
          // Multiply-adds are written out here too.
          P minus_q(-floor);
          if constexpr (soft) {
            minus_q = fmadd(P(-keep), P::load(t_row + i, count), minus_q);
          }
          (g_pack * fmadd(of_e_pack, e, minus_q)).store(grad_row + i, count);
        }
      });
      if constexpr (order == kBackward && !soft) {
        for (int64_t r = 0; r < row.rows; ++r) {
          if (!is_ignored(r)) {
            const int64_t i = labelled(r);
            grad_row[i] = g[r] * (of_e[r] * std::exp(x_row[i] - shift[r]) - (keep + floor));
          }
        }
      }
    }
  });
}

template <Order order, class... Operands>
void run(const CrossEntropy& of, size_t outputs, const Operands&... operands) {
  dispatch(of.input.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const std::array all{operands..., of.input, of.target};
    const bool soft = of.target.is_floating_point();
    (soft ? rows<T, order, true, sizeof...(operands) + 2>
          : rows<T, order, false, sizeof...(operands) + 2>)(all, outputs, of);
  });
}

void forward(const Tensor& output, const CrossEntropy& of) {
  run<kForward>(of, 1, output);
}

void backward(const Tensor& grad_input, const Tensor& grad_output, const CrossEntropy& of) {
  run<kBackward>(of, 1, grad_input, grad_output);
}

void double_backward(
    const Tensor& grad_grad_output, const Tensor& grad_input, const Tensor& grad_grad_input,
    const Tensor& grad_output, const CrossEntropy& of) {
  run<kDoubleBackward>(of, 2, grad_grad_output, grad_input, grad_grad_input, grad_output);
}

}  // namespace
}  // namespace cross_entropy

const CrossEntropyKernels cross_entropy_kernels{
    cross_entropy::forward, cross_entropy::backward, cross_entropy::double_backward};

}  // namespace gradnorm_kernels::CPU_CAPABILITY
