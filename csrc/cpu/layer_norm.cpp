#include "layer_norm.h"

#include "pack.h"
#include "parallel.h"

namespace gradnorm_kernels::CPU_CAPABILITY {
namespace layer_norm {
namespace {

// Sums of many elements are taken over blocks of columns first.
constexpr int64_t kBlock = 64;

template <class P, size_t N>
C10_ALWAYS_INLINE void add(std::array<P, N>& sums, const std::array<P, N>& terms) {
  for (size_t k = 0; k < N; ++k) {
    sums[k] = sums[k] + terms[k];
  }
}

// unit(index, gradients) for every unit of work, on all threads. The gradients of parameters are [chunks,
// columns], or null: a unit gets its chunk's, to add to.
template <class Scalar, size_t N, class Unit>
void for_each_unit(const NormalizedRows& rows, const std::array<Scalar*, N>& gradients, const Unit& unit) {
  const int64_t in_chunk = rows.units_in_chunk();
  const int64_t chunk_elements = in_chunk * rows.columns * std::min(rows.inner, NormalizedRows::kTile);
  const int64_t grain = std::max<int64_t>(1, at::internal::GRAIN_SIZE / chunk_elements);
  gradnorm_kernels::parallel_for(0, rows.chunks(), grain, [&](int64_t first, int64_t last) {
    // A copy, which lives in registers: for all the compiler knows, a store may change the original.
    const Unit own_unit = unit;
    for (int64_t chunk = first; chunk < last; ++chunk) {
      std::array<Scalar*, N> own = gradients;
      for (Scalar*& gradient : own) {
        if (gradient) {
          gradient += chunk * rows.columns;
          std::fill_n(gradient, rows.columns, Scalar(0));
        }
      }
      for (int64_t i = chunk * in_chunk; i < std::min((chunk + 1) * in_chunk, rows.units()); ++i) {
        own_unit(i, own);
      }
    }
  });
}

// A unit of work is gone through pack by pack. Where the elements of one are: in memory, among the columns,
// and among the packs that have statistics of their own.
template <class Count>
struct Place {
  int64_t element;
  Count count;  // a compile-time constant but for the last pack
  int64_t column;
  size_t pack;
};

// One row: a pack holds neighbouring columns.
template <class P>
class Along {
  using Scalar = typename P::Scalar;
  int64_t columns_, row_;

 public:
  static constexpr size_t packs = 1;

  Along(const NormalizedRows& rows, int64_t unit) : columns_(rows.columns), row_(unit) {}

  // For null, zeros.
  std::array<P, packs> statistics(const Scalar* data) const {
    return {data ? P(data[row_]) : P()};
  }
  // fn(pack, row, count)
  template <class Fn>
  void for_each_statistic(const Fn& fn) const {
    fn(0, row_, 1);
  }
  template <class Count>
  static P parameter(const Scalar* data, const Place<Count>& at) {
    return P::load(data + at.column, at.count);
  }

  // scale times the row's sums of terms(place).
  template <size_t N, class Terms>
  std::array<std::array<P, N>, packs> sum(const Terms& terms, Scalar scale = 1) const {
    std::array<Scalar, N> totals{};
    constexpr int64_t block = kBlock * P::size;
    for (int64_t begin = 0; begin < columns_; begin += block) {
      std::array<P, N> sums;
      for_each_pack<P>(std::min(block, columns_ - begin), [&](int64_t start, auto count) {
        add(sums, terms(place(begin + start, count)));
      });
      for (size_t k = 0; k < N; ++k) {
        totals[k] += sums[k].sum() * scale;
      }
    }
    std::array<std::array<P, N>, packs> result;
    std::copy(totals.begin(), totals.end(), result[0].begin());
    return result;
  }

  // Calls terms(place), and adds what it returns to those gradients of parameters that are not null.
  template <size_t N, class Terms>
  void sweep(const std::array<Scalar*, N>& gradients, const Terms& terms) const {
    for_each_pack<P>(columns_, [&](int64_t start, auto count) {
      const std::array<P, N> all = terms(place(start, count));
      for (size_t k = 0; k < N; ++k) {
        if (gradients[k]) {
          (P::load(gradients[k] + start, count) + all[k]).store(gradients[k] + start, count);
        }
      }
    });
  }

 private:
  template <class Count>
  Place<Count> place(int64_t column, Count count) const {
    return {row_ * columns_ + column, count, column, 0};
  }
};

// A tile of interleaved rows: a pack holds one column of neighbouring rows.
template <class P>
class Across {
  using Scalar = typename P::Scalar;
  int64_t columns_, inner_, element_, row_, count_;

 public:
  static constexpr size_t packs = std::max<int64_t>(1, NormalizedRows::kTile / P::size);

  Across(const NormalizedRows& rows, int64_t unit) : columns_(rows.columns), inner_(rows.inner) {
    const int64_t outer = unit / rows.tiles(), start = unit % rows.tiles() * NormalizedRows::kTile;
    element_ = outer * columns_ * inner_ + start;
    row_ = outer * inner_ + start;
    count_ = std::min(NormalizedRows::kTile, inner_ - start);
  }

  std::array<P, packs> statistics(const Scalar* data) const {
    std::array<P, packs> result;
    if (data) {
      for_each_statistic([&](auto pack, auto row, auto count) { result[pack] = P::load(data + row, count); });
    }
    return result;
  }
  template <class Fn>
  void for_each_statistic(const Fn& fn) const {
    for_each_pack<P>(count_, [&](int64_t start, auto count) { fn(pack_at(start), row_ + start, count); });
  }
  template <class Count>
  static P parameter(const Scalar* data, const Place<Count>& at) {
    return P(data[at.column]);
  }

  template <size_t N, class Terms>
  std::array<std::array<P, N>, packs> sum(const Terms& terms, Scalar scale = 1) const {
    std::array<std::array<P, N>, packs> totals{};
    for (int64_t column = 0; column < columns_;) {
      const int64_t end = std::min(column + kBlock, columns_);
      std::array<std::array<P, N>, packs> sums{};
      for (; column < end; ++column) {
        for_each_place(column, [&](const auto& place) { add(sums[place.pack], terms(place)); });
      }
      for (size_t k = 0; k < packs; ++k) {
        add(totals[k], sums[k]);
      }
    }
    for (auto& of_pack : totals) {
      for (P& total : of_pack) {
        total = total * P(scale);
      }
    }
    return totals;
  }

  template <size_t N, class Terms>
  void sweep(const std::array<Scalar*, N>& gradients, const Terms& terms) const {
    for (int64_t column = 0; column < columns_; ++column) {
      std::array<P, N> sums;
      for_each_place(column, [&](const auto& place) { add(sums, terms(place)); });
      for (size_t k = 0; k < N; ++k) {
        if (gradients[k]) {
          gradients[k][column] += sums[k].sum();
        }
      }
    }
  }

 private:
  static size_t pack_at(int64_t start) {
    return static_cast<size_t>(start) / P::size;
  }
  template <class Fn>
  void for_each_place(int64_t column, const Fn& fn) const {
    for_each_pack<P>(count_, [&](int64_t start, auto count) {
      fn(Place<decltype(count)>{element_ + column * inner_ + start, count, column, pack_at(start)});
    });
  }
};

// A layer norm is centred; an RMS norm has no mean and no bias.

template <bool centred, class P>
C10_ALWAYS_INLINE P normalized(const P& x, const P& mean, const P& rstd) {
  return centred ? (x - mean) * rstd : x * rstd;
}
// Of which the sums are taken: only what is centred has use for that of a.
template <bool centred, class P>
std::array<P, 1 + centred> terms(const P& product, const P& a) {
  if constexpr (centred) {
    return {product, a};
  } else {
    return {product};
  }
}

// The double backward of one row: of v = grad_grad_input, u = grad_grad_weight and g = grad_output.
template <class P, bool centred, bool kParameters>
struct DoubleBackwardRow {
  static constexpr size_t kProducts = 3 + kParameters;
  static constexpr size_t kSums = centred ? 2 * kProducts - 1 : kProducts;
  P mean, rstd;
  P v_mean, v_xhat, gw_mean, gw_xhat;  // P(v) = v - v_mean - v_xhat x_hat
  P gu_mean, times_xhat;

  DoubleBackwardRow() = default;
  // of means over the row, in the order of terms()
  DoubleBackwardRow(const P& mean, const P& rstd, const std::array<P, kSums>& means)
      : mean(mean), rstd(rstd), v_xhat(means[0]), gw_xhat(means[1]) {
    P sum = P(3) * gw_xhat * v_xhat;
    if constexpr (centred) {
      v_mean = means[kProducts];
      gw_mean = means[kProducts + 1];
      sum = sum + gw_mean * v_mean;
    }
    times_xhat = rstd * (sum - means[2]);
    if constexpr (kParameters) {
      times_xhat = times_xhat - means[3];
      if constexpr (centred) {
        gu_mean = means[kProducts + 2];
      }
    }
  }

  static C10_ALWAYS_INLINE std::array<P, kSums> terms(
      const P& x_hat, const P& v, const P& g, const P& weight, const P& u) {
    const P gw = g * weight;
    std::array<P, kSums> result;
    result[0] = v * x_hat;
    result[1] = gw * x_hat;
    result[2] = v * gw;
    if constexpr (kParameters) {
      result[3] = g * u * x_hat;
    }
    if constexpr (centred) {
      result[kProducts] = v;
      result[kProducts + 1] = gw;
      if constexpr (kParameters) {
        result[kProducts + 2] = g * u;
      }
    }
    return result;
  }

  // grad_grad_output, grad_input and the contribution to grad_weight.
  C10_ALWAYS_INLINE std::array<P, 3> results(
      const P& x, const P& v, const P& g, const P& weight, const P& u, const P& grad_grad_bias) const {
    const auto minus = [](const P& a, const P& a_mean) { return centred ? a - a_mean : a; };
    const P x_hat = normalized<centred>(x, mean, rstd);
    const P v_centred = minus(v, v_mean);
    const P projected = rstd * (v_centred - v_xhat * x_hat);
    P grad_grad_output = weight * projected;
    // rstd is large where a row hardly varies: it multiplies differences, and no two terms that cancel.
    P sum = times_xhat * x_hat - rstd * (gw_xhat * v_centred + v_xhat * minus(g * weight, gw_mean));
    if constexpr (kParameters) {
      grad_grad_output = grad_grad_output + u * x_hat;
      if constexpr (centred) {
        grad_grad_output = grad_grad_output + grad_grad_bias;
      }
      sum = sum + minus(g * u, gu_mean);
    }
    return {grad_grad_output, rstd * sum, g * projected};
  }
};

template <class T, template <class> class WalkOf, bool centred>
struct Kernels {
  using P = Pack<T>;
  using Scalar = typename P::Scalar;
  using Walk = WalkOf<P>;
  static constexpr size_t packs = Walk::packs;

  template <class Count>
  static C10_ALWAYS_INLINE P load(const T* from, const Place<Count>& at) {
    return P::load(from + at.element, at.count);
  }

  static void forward(const LayerNormKernels::Forward& t, double eps, const NormalizedRows& rows) {
    using Vector = typename P::Vector;
    const T* const input = const_data<T>(t.input);
    const Scalar* const weight = const_data<Scalar>(t.weight);
    const Scalar* const bias = const_data<Scalar>(t.bias);
    T* const output = mutable_data<T>(t.output);
    Scalar* const mean = mutable_data<Scalar>(t.mean);
    Scalar* const rstd = mutable_data<Scalar>(t.rstd);
    const P per_column(Scalar(1) / rows.columns);

    for_each_unit(rows, std::array<Scalar*, 0>(), [=](int64_t unit, const auto& no_gradients) {
      const Walk walk(rows, unit);
      const auto x_at = [&](const auto& at) { return load(input, at); };
      std::array<std::array<P, 1>, packs> sums;
      if constexpr (centred) {
        sums = walk.template sum<1>([&](const auto& at) { return std::array{x_at(at)}; });
      }
      const auto moments = walk.template sum<1 + centred>([&](const auto& at) {
        const P x = centred ? x_at(at) - sums[at.pack][0] * per_column : x_at(at);
        return terms<centred>(x * x, x);
      });
      walk.for_each_statistic([&](size_t pack, int64_t row, auto count) {
        P variance;
        if constexpr (centred) {
          // What rounding left of the first mean.
          const P shift = moments[pack][1] * per_column;
          variance = moments[pack][0] * per_column - shift * shift;
          (sums[pack][0] * per_column + shift).store(mean + row, count);
        } else {
          variance = moments[pack][0] * per_column;
        }
        P::map(
            [&](const Vector& v) {
              // Rounding may have left less than nothing.
              return (at::vec::maximum(v, Vector(0)) + Vector(eps)).rsqrt();
            },
            variance)
            .store(rstd + row, count);
      });
      const auto means = walk.statistics(mean), rstds = walk.statistics(rstd);
      walk.sweep(no_gradients, [&](const auto& at) {
        P y = normalized<centred>(x_at(at), means[at.pack], rstds[at.pack]) * walk.parameter(weight, at);
        if constexpr (centred) {
          y = y + walk.parameter(bias, at);
        }
        y.store(output + at.element, at.count);
        return std::array<P, 0>();
      });
    });
  }

  static void backward(const LayerNormKernels::Backward& t, const NormalizedRows& rows) {
    const T* const grad_output = const_data<T>(t.grad_output);
    const T* const input = const_data<T>(t.input);
    const Scalar* const mean = const_data<Scalar>(t.mean);
    const Scalar* const rstd = const_data<Scalar>(t.rstd);
    const Scalar* const weight = const_data<Scalar>(t.weight);
    T* const grad_input = mutable_data<T>(t.grad_input);
    const P per_column(Scalar(1) / rows.columns);

    const std::array gradients{mutable_data<Scalar>(t.grad_weight), mutable_data<Scalar>(t.grad_bias)};
    for_each_unit(rows, gradients, [=](int64_t unit, const auto& of_chunk) {
      const Walk walk(rows, unit);
      const auto means = walk.statistics(mean), rstds = walk.statistics(rstd);
      const auto x_hat_and_g = [&](const auto& at) {
        const P x = load(input, at);
        return std::pair{normalized<centred>(x, means[at.pack], rstds[at.pack]), load(grad_output, at)};
      };
      std::array<std::array<P, 1 + centred>, packs> sums;
      if (grad_input) {
        sums = walk.template sum<1 + centred>([&](const auto& at) {
          const auto [x_hat, g] = x_hat_and_g(at);
          const P gw = g * walk.parameter(weight, at);
          return terms<centred>(gw * x_hat, gw);
        });
      }
      walk.sweep(of_chunk, [&](const auto& at) {
        const auto [x_hat, g] = x_hat_and_g(at);
        if (grad_input) {
          P lost = x_hat * sums[at.pack][0];
          if constexpr (centred) {
            lost = sums[at.pack][1] + lost;
          }
          (rstds[at.pack] * (g * walk.parameter(weight, at) - per_column * lost))
              .store(grad_input + at.element, at.count);
        }
        return std::array{g * x_hat, g};
      });
    });
  }

  template <bool kParameters>
  static void double_backward(const LayerNormKernels::DoubleBackward& t, const NormalizedRows& rows) {
    using Row = DoubleBackwardRow<P, centred, kParameters>;
    const T* const grad_grad_input = const_data<T>(t.grad_grad_input);
    const T* const grad_output = const_data<T>(t.grad_output);
    const T* const input = const_data<T>(t.input);
    const Scalar* const mean = const_data<Scalar>(t.mean);
    const Scalar* const rstd = const_data<Scalar>(t.rstd);
    const Scalar* const weight = const_data<Scalar>(t.weight);
    const Scalar* const grad_grad_weight = const_data<Scalar>(t.grad_grad_weight);
    const Scalar* const grad_grad_bias = const_data<Scalar>(t.grad_grad_bias);
    T* const grad_grad_output = mutable_data<T>(t.grad_grad_output);
    T* const grad_input = mutable_data<T>(t.grad_input);
    const Scalar per_column = Scalar(1) / rows.columns;

    const std::array gradients{mutable_data<Scalar>(t.grad_weight)};
    for_each_unit(rows, gradients, [=](int64_t unit, const auto& of_chunk) {
      const Walk walk(rows, unit);
      const auto means = walk.statistics(mean), rstds = walk.statistics(rstd);
      const auto parameter = [&](const Scalar* from, const auto& at) {
        return kParameters ? walk.parameter(from, at) : P();
      };
      const auto row_means = walk.template sum<Row::kSums>(
          [&](const auto& at) {
            return Row::terms(
                normalized<centred>(load(input, at), means[at.pack], rstds[at.pack]),
                load(grad_grad_input, at), load(grad_output, at), walk.parameter(weight, at),
                parameter(grad_grad_weight, at));
          },
          per_column);
      std::array<Row, packs> row;
      for (size_t pack = 0; pack < row.size(); ++pack) {
        row[pack] = Row(means[pack], rstds[pack], row_means[pack]);
      }
      walk.sweep(of_chunk, [&](const auto& at) {
        const auto [grad_g, grad_x, for_weight] = row[at.pack].results(
            load(input, at), load(grad_grad_input, at), load(grad_output, at), walk.parameter(weight, at),
            parameter(grad_grad_weight, at), centred ? parameter(grad_grad_bias, at) : P());
        if (grad_grad_output) {
          grad_g.store(grad_grad_output + at.element, at.count);
        }
        if (grad_input) {
          grad_x.store(grad_input + at.element, at.count);
        }
        return std::array{for_weight};
      });
    });
  }
};

// fn(Kernels()) for the dtype and the rows. Forward and backward of a layer norm over rows are ATen's.
template <bool layer_norm_along, class Fn>
void select(const Tensor& input, const NormalizedRows& rows, const Fn& fn) {
  dispatch(input.scalar_type(), [&](auto type) {
    using T = decltype(type);
    if (rows.centred) {
      if constexpr (layer_norm_along) {
        if (rows.inner == 1) {
          return fn(Kernels<T, Along, true>());
        }
      }
      return fn(Kernels<T, Across, true>());
    }
    rows.inner == 1 ? fn(Kernels<T, Along, false>()) : fn(Kernels<T, Across, false>());
  });
}

}  // namespace
}  // namespace layer_norm

const LayerNormKernels layer_norm_kernels{
    [](const auto& t, double eps, const auto& rows) {
      layer_norm::select<false>(t.input, rows, [&](auto kernels) { kernels.forward(t, eps, rows); });
    },
    [](const auto& t, const auto& rows) {
      layer_norm::select<false>(t.input, rows, [&](auto kernels) { kernels.backward(t, rows); });
    },
    [](const auto& t, const auto& rows) {
      layer_norm::select<true>(t.input, rows, [&](auto kernels) {
        t.grad_grad_weight.defined() ? kernels.template double_backward<true>(t, rows)
                                     : kernels.template double_backward<false>(t, rows);
      });
    }};

}  // namespace gradnorm_kernels::CPU_CAPABILITY
