#include "cdist.h"

#include <ATen/ceil_div.h>

#include <vector>

#include "pack.h"
#include "parallel.h"

namespace gradnorm_kernels::CPU_CAPABILITY {
namespace cdist {
namespace {

using at::Tensor;

// Packs of pairs that are computed together: x_i with neighbouring y_j.
constexpr size_t kPacks = 4;
// Of a long sum in one go, the error grows with its length.
constexpr int64_t kTerms = 16, kRows = 32;

template <class Vector>
C10_ALWAYS_INLINE Vector sign(const Vector& x) {
  const Vector one(1), zero(0);
  return (one & (x > zero)) - (one & (x < zero));
}

// fn(k), of a compile-time k.
template <size_t n, class Fn>
C10_ALWAYS_INLINE void unrolled(const Fn& fn) {
  [&]<size_t... k>(std::index_sequence<k...>) C10_ALWAYS_INLINE_ATTRIBUTE {
    (fn(std::integral_constant<size_t, k>()), ...);
  }(std::make_index_sequence<n>());
}

// Of point i: x and u its coordinates, y and v those of all y_j, with as much between two coordinates as
// there are points. grad_y, of some coordinates, is of `width` points from the first one on. Null is what is
// not wanted.
template <class T>
struct Row {
  using P = Pack<T>;
  using Scalar = typename P::Scalar;
  using Vector = typename P::Vector;

  const Scalar *x, *u, *y, *v;
  const T* g;
  T* grad_grad_output;
  P* grad_x;
  Scalar* grad_y;
  int64_t coordinates, stride, first, width;

  // As csrc/cdist.cpp derives it.
  template <size_t packs, bool euclidean, class Count>
  C10_ALWAYS_INLINE void pairs(int64_t j, Count count) const {
    std::array<P, packs> squared, along;
    for (int64_t d = 0; d < coordinates; d += kTerms) {
      std::array<P, packs> squared_part, part;
      const auto add = [&](int64_t, auto k, const P& e, const P& f) C10_ALWAYS_INLINE_ATTRIBUTE {
        if constexpr (euclidean) {
          squared_part[k] = fmadd(e, e, squared_part[k]);
          part[k] = fmadd(e, f, part[k]);
        } else {
          // Times f, which may be NaN where the sign is 0.
          part[k] = fmadd(P::map([](const Vector& x) { return sign(x); }, e), f, part[k]);
        }
      };
      each_difference<packs>(d, std::min(coordinates, d + kTerms), j, count, add);
      unrolled<packs>([&](auto k) C10_ALWAYS_INLINE_ATTRIBUTE {
        squared[k] = squared[k] + squared_part[k];
        along[k] = along[k] + part[k];
      });
    }
    std::array<P, packs> of_e, of_f;
    unrolled<packs>([&](auto k) C10_ALWAYS_INLINE_ATTRIBUTE {
      const int64_t start = j + k * P::size;
      if constexpr (euclidean) {
        const P inverse = P::map(
            [](const Vector& s) { return Vector::blendv(Vector(1) / s.sqrt(), Vector(0), s == Vector(0)); },
            squared[k]);
        along[k] = along[k] * inverse;
        of_f[k] = P::load(g + start, count) * inverse;
        of_e[k] = P(0) - of_f[k] * along[k] * inverse;
        if constexpr (packs == 1) {  // 0 beyond count, whatever the differences are there.
          of_f[k] = of_f[k].first(count, 0);
          of_e[k] = of_e[k].first(count, 0);
        }
      }
      if (grad_grad_output) {
        along[k].store(grad_grad_output + start, count);
      }
    });
    if constexpr (euclidean) {
      if (grad_x) {
        each_difference<packs>(
            0, coordinates, j, count,
            [&](int64_t d, auto k, const P& e, const P& f) C10_ALWAYS_INLINE_ATTRIBUTE {
              const P sum = fmadd(of_e[k], e, of_f[k] * f);
              grad_x[d] = grad_x[d] + sum;
              Scalar* const to = grad_y + d * width + j - first + k * P::size;
              (P::load(to, count) - sum).store(to, count);
            });
      }
    }
  }

 private:
  // fn(coordinate, k, e, f) of pack k, for the coordinates from first to last.
  template <size_t packs, class Count, class Fn>
  C10_ALWAYS_INLINE void each_difference(
      int64_t first, int64_t last, int64_t j, Count count, const Fn& fn) const {
    for (int64_t d = first; d < last; ++d) {
      const P x_d(x[d]), u_d(u[d]);
      unrolled<packs>([&](auto k) C10_ALWAYS_INLINE_ATTRIBUTE {
        const int64_t from = d * stride + j + k * P::size;
        fn(d, k, x_d - P::load(y + from, count), u_d - P::load(v + from, count));
      });
    }
  }
};

// A task is some rows of a batch and some columns. What several tasks add to one gradient they write apart,
// so that no bit depends on the threads.
template <class T, bool euclidean>
std::tuple<Tensor, Tensor> double_backward(
    const Tensor& grad_grad_output, const Tensor& u, const Tensor& v, const Tensor& g, const Tensor& x,
    const Tensor& y, bool wanted) {
  using P = Pack<T>;
  using Scalar = typename P::Scalar;
  constexpr int64_t together = kPacks * P::size, tasks_wanted = 16;
  const int64_t batch = x.size(0), n = x.size(1), coordinates = x.size(2), m = y.size(2);
  const auto parts_of = [](int64_t size, int64_t at_most) { return std::clamp<int64_t>(at_most, 1, size); };
  const int64_t groups = at::ceil_div(m, together);
  const int64_t column_parts = parts_of(groups, tasks_wanted / batch);
  const int64_t row_parts = parts_of(n, tasks_wanted / (batch * column_parts));
  const int64_t columns = at::ceil_div(groups, column_parts) * together, rows = at::ceil_div(n, row_parts);

  Tensor grad_x, grad_y;
  if (wanted && euclidean) {
    grad_x = at::empty({batch, column_parts, n, coordinates}, x.options());
    grad_y = at::zeros({batch, row_parts, coordinates, m}, x.options());
  }
  const auto* x_data = x.const_data_ptr<Scalar>();
  const auto* u_data = u.const_data_ptr<Scalar>();
  const auto* y_data = y.const_data_ptr<Scalar>();
  const auto* v_data = v.const_data_ptr<Scalar>();
  const auto* g_data = g.const_data_ptr<T>();
  auto* const output_data = mutable_data<T>(grad_grad_output);
  auto* const grad_x_data = mutable_data<Scalar>(grad_x);
  auto* const grad_y_data = mutable_data<Scalar>(grad_y);
  parallel_for(0, batch * column_parts * row_parts, 1, [&](int64_t begin, int64_t end) {
    std::vector<P> sums(grad_x_data ? coordinates : 0);
    std::vector<Scalar> some_rows(grad_x_data ? coordinates * columns : 0);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row_part = task % row_parts, part = task / row_parts;  // part: of columns, of all batches
      const int64_t b = part / column_parts, first = part % column_parts * columns;
      const int64_t last = std::min(m, first + columns);
      const int64_t end_of_rows = std::min(n, (row_part + 1) * rows);
      for (int64_t i = row_part * rows; i < end_of_rows; ++i) {
        std::fill(sums.begin(), sums.end(), P());
        const int64_t point = (b * n + i) * coordinates, others = b * coordinates * m, pair = (b * n + i) * m;
        const Row<T> row{
            x_data + point,
            u_data + point,
            y_data + others,
            v_data + others,
            g_data + pair,
            output_data ? output_data + pair : nullptr,
            grad_x_data ? sums.data() : nullptr,
            some_rows.data(),
            coordinates,
            m,
            first,
            columns};
        int64_t j = first;
        for (; j + together <= last; j += together) {
          row.template pairs<kPacks, euclidean>(j, std::integral_constant<int64_t, P::size>());
        }
        for (; j < last; j += P::size) {
          row.template pairs<1, euclidean>(j, std::min(P::size, last - j));
        }
        for (size_t d = 0; d < sums.size(); ++d) {
          grad_x_data[(part * n + i) * coordinates + static_cast<int64_t>(d)] = sums[d].sum();
        }
        if (grad_x_data && ((i + 1) % kRows == 0 || i + 1 == end_of_rows)) {
          for (int64_t d = 0; d < coordinates; ++d) {
            auto* const to = grad_y_data + ((b * row_parts + row_part) * coordinates + d) * m;
            for (int64_t k = first; k < last; ++k) {
              to[k] += some_rows[d * columns + k - first];
            }
          }
          std::fill(some_rows.begin(), some_rows.end(), Scalar(0));
        }
      }
    }
  });
  if (!grad_x.defined()) {
    return {};
  }
  return {grad_x.sum(1), grad_y.sum(1)};
}

}  // namespace
}  // namespace cdist

const CdistKernels cdist_kernels{[](const auto& grad_grad_output, const auto& u, const auto& v, const auto& g,
                                    const auto& x, const auto& y, bool euclidean, bool wanted) {
  std::tuple<at::Tensor, at::Tensor> gradients;
  dispatch(g.scalar_type(), [&](auto type) {
    using T = decltype(type);
    gradients =
        (euclidean ? &cdist::double_backward<T, true>
                   : &cdist::double_backward<T, false>)(grad_grad_output, u, v, g, x, y, wanted);
  });
  return gradients;
}};

}  // namespace gradnorm_kernels::CPU_CAPABILITY
