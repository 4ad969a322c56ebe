#include "layer_norm.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/TensorIterator.h>
#include <ATen/cpu/vec/functional.h>

#include <array>
#include <tuple>
#include <type_traits>

#include "parallel.h"

namespace gradnorm_kernels::CPU_CAPABILITY {
namespace {

// The elements of one vector of T, in as many vectors of the type arithmetic is done in.
template <class T>
struct Pack {
  using Scalar = at::opmath_type<T>;
  using Vector = at::vec::Vectorized<Scalar>;
  static constexpr int64_t size = at::vec::Vectorized<T>::size();
  static constexpr size_t parts = size / Vector::size();
  std::array<Vector, parts> part;

  Pack() : Pack(Scalar(0)) {}
  Pack(Scalar scalar) {
    part.fill(Vector(scalar));
  }

  // S is T or Scalar. Elements from count on are 0.
  template <class S>
  static Pack load(const S* data, int64_t count) {
    Pack pack;
    if constexpr (std::is_same_v<S, Scalar>) {
      for (size_t k = 0; k < parts; ++k) {
        const int64_t left = count - k * Vector::size();
        pack.part[k] = left >= Vector::size() ? Vector::loadu(data + k * Vector::size())
                       : left > 0             ? Vector::loadu(data + k * Vector::size(), left)
                                              : Vector(0);
      }
    } else {
      using Stored = at::vec::Vectorized<S>;
      const Stored stored = count == size ? Stored::loadu(data) : Stored::loadu(data, count);
      std::tie(pack.part[0], pack.part[1]) = at::vec::convert_to_float<S>(stored);
    }
    return pack;
  }

  template <class S>
  void store(S* data, int64_t count) const {
    if constexpr (std::is_same_v<S, Scalar>) {
      for (size_t k = 0; k < parts; ++k) {
        const int64_t left = count - k * Vector::size();
        if (left > 0) {
          part[k].store(data + k * Vector::size(), std::min<int64_t>(left, Vector::size()));
        }
      }
    } else {
      at::vec::convert_from_float<S>(part[0], part[1]).store(data, count);
    }
  }

  Scalar sum() const {
    Vector total = part[0];
    for (size_t k = 1; k < parts; ++k) {
      total = total + part[k];
    }
    return at::vec::vec_reduce_all<Scalar>([](Vector& a, Vector& b) { return a + b; }, total);
  }

  template <class Fn>
  static Pack map(const Fn& fn) {
    Pack result;
    for (size_t k = 0; k < parts; ++k) {
      result.part[k] = fn(k);
    }
    return result;
  }
  friend Pack operator+(const Pack& a, const Pack& b) {
    return map([&](size_t k) { return a.part[k] + b.part[k]; });
  }
  friend Pack operator-(const Pack& a, const Pack& b) {
    return map([&](size_t k) { return a.part[k] - b.part[k]; });
  }
  friend Pack operator*(const Pack& a, const Pack& b) {
    return map([&](size_t k) { return a.part[k] * b.part[k]; });
  }
};

// body(start, count) for every pack of n elements; count is a compile-time constant but for the last.
template <class P, class Body>
void for_each_pack(int64_t n, const Body& body) {
  int64_t start = 0;
  for (; start + P::size <= n; start += P::size) {
    body(start, std::integral_constant<int64_t, P::size>());
  }
  if (start < n) {
    body(start, n - start);
  }
}

// Sums of many elements are taken over blocks of columns first.
constexpr int64_t kBlock = 64;

template <class V, size_t N>
void add(std::array<V, N>& sums, const std::array<V, N>& terms) {
  for (size_t k = 0; k < N; ++k) {
    sums[k] = sums[k] + terms[k];
  }
}

template <class T>
const T* data(const Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<T>() : nullptr;
}
template <class T>
T* mutable_data(const Tensor& tensor) {
  return tensor.defined() ? tensor.mutable_data_ptr<T>() : nullptr;
}

// unit(index, chunk) for every unit of work, with the chunk's number, on all threads; begin(chunk) before.
template <class Begin, class Unit>
void for_each_unit(const NormalizedRows& rows, const Begin& begin, const Unit& unit) {
  const int64_t in_chunk = rows.units_in_chunk();
  const int64_t chunk_elements = in_chunk * rows.columns * std::min(rows.inner, NormalizedRows::kTile);
  const int64_t grain = std::max<int64_t>(1, at::internal::GRAIN_SIZE / chunk_elements);
  gradnorm_kernels::parallel_for(0, rows.chunks(), grain, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      begin(chunk);
      for (int64_t i = chunk * in_chunk; i < std::min((chunk + 1) * in_chunk, rows.units()); ++i) {
        unit(i, chunk);
      }
    }
  });
}

// Where a tile of interleaved rows starts, and how many rows it has.
struct Tile {
  int64_t element, row, count;

  Tile(const NormalizedRows& rows, int64_t unit) {
    const int64_t outer = unit / rows.tiles();
    const int64_t start = (unit % rows.tiles()) * NormalizedRows::kTile;
    element = outer * rows.columns * rows.inner + start;
    row = outer * rows.inner + start;
    count = std::min(NormalizedRows::kTile, rows.inner - start);
  }
};

// One V for every pack of a tile.
template <class P, class V>
using PerPack = std::array<V, std::max<int64_t>(1, NormalizedRows::kTile / P::size)>;

// The sums over the columns of a tile of terms(start, count, column), for every pack of its rows.
template <class P, size_t N, class Terms>
PerPack<P, std::array<P, N>> sum_tile(const NormalizedRows& rows, const Tile& tile, const Terms& terms) {
  PerPack<P, std::array<P, N>> totals{};
  for (int64_t column = 0; column < rows.columns;) {
    const int64_t end = std::min(column + kBlock, rows.columns);
    PerPack<P, std::array<P, N>> sums{};
    for (; column < end; ++column) {
      for_each_pack<P>(tile.count, [&](int64_t start, auto count) {
        add(sums[start / P::size], terms(start, count, column));
      });
    }
    for (size_t k = 0; k < sums.size(); ++k) {
      add(totals[k], sums[k]);
    }
  }
  return totals;
}

template <class T>
void forward(const LayerNormKernels::Forward& t, double eps, const NormalizedRows& rows) {
  using P = Pack<T>;
  using Scalar = typename P::Scalar;
  using Vector = typename P::Vector;
  const T* const input = data<T>(t.input);
  const Scalar* const weight = data<Scalar>(t.weight);
  const Scalar* const bias = data<Scalar>(t.bias);
  T* const output = mutable_data<T>(t.output);
  Scalar* const mean = mutable_data<Scalar>(t.mean);
  Scalar* const rstd = mutable_data<Scalar>(t.rstd);
  const P per_column(Scalar(1) / rows.columns);

  const auto begin = [](int64_t) {};
  for_each_unit(rows, begin, [&](int64_t unit, int64_t) {
    const Tile tile(rows, unit);
    const auto x_at = [&](int64_t start, auto count, int64_t column) {
      return P::load(input + tile.element + column * rows.inner + start, count);
    };
    const auto sums = sum_tile<P, 1>(rows, tile, [&](int64_t start, auto count, int64_t column) {
      return std::array{x_at(start, count, column)};
    });
    const auto centred = sum_tile<P, 2>(rows, tile, [&](int64_t start, auto count, int64_t column) {
      const P x = x_at(start, count, column) - sums[start / P::size][0] * per_column;
      return std::array{x, x * x};
    });
    for_each_pack<P>(tile.count, [&](int64_t start, auto count) {
      const auto& [residue, squares] = centred[start / P::size];
      // What rounding left of the first mean.
      const P shift = residue * per_column;
      const P variance = squares * per_column - shift * shift;
      (sums[start / P::size][0] * per_column + shift).store(mean + tile.row + start, count);
      P::map([&](size_t k) {
        // Rounding may have left less than nothing.
        return (at::vec::maximum(variance.part[k], Vector(0)) + Vector(eps)).rsqrt();
      }).store(rstd + tile.row + start, count);
    });
    for (int64_t column = 0; column < rows.columns; ++column) {
      for_each_pack<P>(tile.count, [&](int64_t start, auto count) {
        const P x_hat = (x_at(start, count, column) - P::load(mean + tile.row + start, count)) *
                        P::load(rstd + tile.row + start, count);
        (x_hat * P(weight[column]) + P(bias[column]))
            .store(output + tile.element + column * rows.inner + start, count);
      });
    }
  });
}

template <class T>
void backward(const LayerNormKernels::Backward& t, const NormalizedRows& rows) {
  using P = Pack<T>;
  using Scalar = typename P::Scalar;
  const T* const grad_output = data<T>(t.grad_output);
  const T* const input = data<T>(t.input);
  const Scalar* const mean = data<Scalar>(t.mean);
  const Scalar* const rstd = data<Scalar>(t.rstd);
  const Scalar* const weight = data<Scalar>(t.weight);
  T* const grad_input = mutable_data<T>(t.grad_input);
  Scalar* const grad_weight = mutable_data<Scalar>(t.grad_weight);
  Scalar* const grad_bias = mutable_data<Scalar>(t.grad_bias);
  const P per_column(Scalar(1) / rows.columns);

  const auto begin = [&](int64_t chunk) {
    for (Scalar* const gradient : {grad_weight, grad_bias}) {
      if (gradient) {
        std::fill_n(gradient + chunk * rows.columns, rows.columns, Scalar(0));
      }
    }
  };
  for_each_unit(rows, begin, [&](int64_t unit, int64_t chunk) {
    const Tile tile(rows, unit);
    // x_hat and g.
    const auto load = [&](int64_t start, auto count, int64_t column) {
      const int64_t element = tile.element + column * rows.inner + start;
      const P x_hat = (P::load(input + element, count) - P::load(mean + tile.row + start, count)) *
                      P::load(rstd + tile.row + start, count);
      return std::pair{x_hat, P::load(grad_output + element, count)};
    };
    PerPack<P, std::array<P, 2>> sums{};
    if (grad_input) {
      sums = sum_tile<P, 2>(rows, tile, [&](int64_t start, auto count, int64_t column) {
        const auto [x_hat, g] = load(start, count, column);
        const P gw = g * P(weight[column]);
        return std::array{gw, gw * x_hat};
      });
    }
    for (int64_t column = 0; column < rows.columns; ++column) {
      P for_weight, for_bias;
      for_each_pack<P>(tile.count, [&](int64_t start, auto count) {
        const auto [x_hat, g] = load(start, count, column);
        if (grad_input) {
          const auto& [gw, gw_xhat] = sums[start / P::size];
          const P scale = P::load(rstd + tile.row + start, count);
          (scale * (g * P(weight[column]) - per_column * (gw + x_hat * gw_xhat)))
              .store(grad_input + tile.element + column * rows.inner + start, count);
        }
        for_weight = for_weight + g * x_hat;
        for_bias = for_bias + g;
      });
      if (grad_weight) {
        grad_weight[chunk * rows.columns + column] += for_weight.sum();
      }
      if (grad_bias) {
        grad_bias[chunk * rows.columns + column] += for_bias.sum();
      }
    }
  });
}

// The double backward of one row, in the notation of gradnorm_kernels/reference.py. V is a scalar where a
// vector holds elements of one row, and a pack where each of its elements belongs to another row.
template <class V, bool kParameters>
struct DoubleBackwardRow {
  static constexpr size_t kSums = kParameters ? 7 : 5;
  V mean, rstd;
  V v_mean, v_xhat, gw_mean, gw_xhat;  // P(v) = v - v_mean - v_xhat x_hat
  V gu_mean, times_xhat;

  // of means over the row, in the order of terms()
  DoubleBackwardRow(const V& mean, const V& rstd, const std::array<V, kSums>& means)
      : mean(mean),
        rstd(rstd),
        v_mean(means[0]),
        v_xhat(means[1]),
        gw_mean(means[2]),
        gw_xhat(means[3]),
        gu_mean(0),
        times_xhat(rstd * (V(3) * gw_xhat * v_xhat + gw_mean * v_mean - means[4])) {
    if constexpr (kParameters) {
      gu_mean = means[5];
      times_xhat = times_xhat - means[6];
    }
  }

  template <class P>
  static std::array<P, kSums> terms(const P& x_hat, const P& v, const P& g, const P& weight, const P& u) {
    const P gw = g * weight;
    std::array<P, kSums> result;
    result[0] = v;
    result[1] = v * x_hat;
    result[2] = gw;
    result[3] = gw * x_hat;
    result[4] = v * gw;
    if constexpr (kParameters) {
      result[5] = g * u;
      result[6] = g * u * x_hat;
    }
    return result;
  }

  // grad_grad_output, grad_input and the contribution to grad_weight.
  template <class P>
  std::array<P, 3> results(
      const P& x, const P& v, const P& g, const P& weight, const P& u, const P& grad_grad_bias) const {
    const P x_hat = (x - P(mean)) * P(rstd);
    const P v_centred = v - P(v_mean);
    const P projected = P(rstd) * (v_centred - P(v_xhat) * x_hat);
    P grad_grad_output = weight * projected;
    // rstd is large where a row hardly varies: it multiplies differences, and no two terms that cancel.
    P sum =
        P(times_xhat) * x_hat - P(rstd) * (P(gw_xhat) * v_centred + P(v_xhat) * (g * weight - P(gw_mean)));
    if constexpr (kParameters) {
      grad_grad_output = grad_grad_output + u * x_hat + grad_grad_bias;
      sum = sum + (g * u - P(gu_mean));
    }
    return {grad_grad_output, P(rstd) * sum, g * projected};
  }
};

template <class T, bool kParameters>
void double_backward(const LayerNormKernels::DoubleBackward& t, const NormalizedRows& rows) {
  using P = Pack<T>;
  using Scalar = typename P::Scalar;
  const T* const grad_grad_input = data<T>(t.grad_grad_input);
  const T* const grad_output = data<T>(t.grad_output);
  const T* const input = data<T>(t.input);
  const Scalar* const mean = data<Scalar>(t.mean);
  const Scalar* const rstd = data<Scalar>(t.rstd);
  const Scalar* const weight = data<Scalar>(t.weight);
  const Scalar* const grad_grad_weight = data<Scalar>(t.grad_grad_weight);
  const Scalar* const grad_grad_bias = data<Scalar>(t.grad_grad_bias);
  T* const grad_grad_output = mutable_data<T>(t.grad_grad_output);
  T* const grad_input = mutable_data<T>(t.grad_input);
  Scalar* const grad_weight = mutable_data<Scalar>(t.grad_weight);
  const Scalar per_column = Scalar(1) / rows.columns;

  const auto begin = [&](int64_t chunk) {
    if (grad_weight) {
      std::fill_n(grad_weight + chunk * rows.columns, rows.columns, Scalar(0));
    }
  };
  const auto store = [&](const auto& results, int64_t element, auto count) {
    if (grad_grad_output) {
      results[0].store(grad_grad_output + element, count);
    }
    if (grad_input) {
      results[1].store(grad_input + element, count);
    }
  };

  const auto row = [&](int64_t unit, int64_t chunk) {
    using Row = DoubleBackwardRow<Scalar, kParameters>;
    const T* const v = grad_grad_input + unit * rows.columns;
    const T* const g = grad_output + unit * rows.columns;
    const T* const x = input + unit * rows.columns;
    const P mean_pack(mean[unit]), rstd_pack(rstd[unit]);
    const auto parameter = [&](const Scalar* from, int64_t start, auto count) {
      return kParameters ? P::load(from + start, count) : P();
    };
    std::array<Scalar, Row::kSums> means{};
    constexpr int64_t block = kBlock * P::size;
    for (int64_t begin = 0; begin < rows.columns; begin += block) {
      std::array<P, Row::kSums> sums{};
      for_each_pack<P>(std::min(block, rows.columns - begin), [&](int64_t start, auto count) {
        start += begin;
        const P x_hat = (P::load(x + start, count) - mean_pack) * rstd_pack;
        add(sums, Row::terms(
                      x_hat, P::load(v + start, count), P::load(g + start, count),
                      P::load(weight + start, count), parameter(grad_grad_weight, start, count)));
      });
      for (size_t k = 0; k < means.size(); ++k) {
        means[k] += sums[k].sum() * per_column;
      }
    }
    const Row coefficients(mean[unit], rstd[unit], means);
    for_each_pack<P>(rows.columns, [&](int64_t start, auto count) {
      const auto results = coefficients.results(
          P::load(x + start, count), P::load(v + start, count), P::load(g + start, count),
          P::load(weight + start, count), parameter(grad_grad_weight, start, count),
          parameter(grad_grad_bias, start, count));
      store(results, unit * rows.columns + start, count);
      if (grad_weight) {
        Scalar* const sum = grad_weight + chunk * rows.columns + start;
        (P::load(sum, count) + results[2]).store(sum, count);
      }
    });
  };

  const auto interleaved = [&](int64_t unit, int64_t chunk) {
    using Row = DoubleBackwardRow<P, kParameters>;
    const Tile tile(rows, unit);
    const auto parameter = [&](const Scalar* from, int64_t column) {
      return kParameters ? P(from[column]) : P();
    };
    const auto sums = sum_tile<P, Row::kSums>(rows, tile, [&](int64_t start, auto count, int64_t column) {
      const int64_t element = tile.element + column * rows.inner + start;
      const P x_hat = (P::load(input + element, count) - P::load(mean + tile.row + start, count)) *
                      P::load(rstd + tile.row + start, count);
      return Row::terms(
          x_hat, P::load(grad_grad_input + element, count), P::load(grad_output + element, count),
          P(weight[column]), parameter(grad_grad_weight, column));
    });
    std::vector<Row> coefficients;
    coefficients.reserve(sums.size());
    for_each_pack<P>(tile.count, [&](int64_t start, auto count) {
      auto means = sums[start / P::size];
      for (auto& mean : means) {
        mean = mean * P(per_column);
      }
      coefficients.emplace_back(
          P::load(mean + tile.row + start, count), P::load(rstd + tile.row + start, count), means);
    });
    for (int64_t column = 0; column < rows.columns; ++column) {
      P for_weight;
      for_each_pack<P>(tile.count, [&](int64_t start, auto count) {
        const int64_t element = tile.element + column * rows.inner + start;
        const auto results = coefficients[start / P::size].results(
            P::load(input + element, count), P::load(grad_grad_input + element, count),
            P::load(grad_output + element, count), P(weight[column]), parameter(grad_grad_weight, column),
            parameter(grad_grad_bias, column));
        store(results, element, count);
        for_weight = for_weight + results[2];
      });
      if (grad_weight) {
        grad_weight[chunk * rows.columns + column] += for_weight.sum();
      }
    }
  };

  if (rows.inner == 1) {
    for_each_unit(rows, begin, row);
  } else {
    for_each_unit(rows, begin, interleaved);
  }
}

template <class Operands, class Fn>
void dispatch(const Operands& operands, const Fn& fn) {
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, operands.input.scalar_type(), "layer_norm", [&] { fn(scalar_t()); });
}

}  // namespace

const LayerNormKernels layer_norm_kernels{
    [](const LayerNormKernels::Forward& operands, double eps, const NormalizedRows& rows) {
      dispatch(operands, [&](auto type) { forward<decltype(type)>(operands, eps, rows); });
    },
    [](const LayerNormKernels::Backward& operands, const NormalizedRows& rows) {
      dispatch(operands, [&](auto type) { backward<decltype(type)>(operands, rows); });
    },
    [](const LayerNormKernels::DoubleBackward& operands, const NormalizedRows& rows) {
      dispatch(operands, [&](auto type) {
        if (operands.grad_grad_weight.defined()) {
          double_backward<decltype(type), true>(operands, rows);
        } else {
          double_backward<decltype(type), false>(operands, rows);
        }
      });
    }};

}  // namespace gradnorm_kernels::CPU_CAPABILITY
