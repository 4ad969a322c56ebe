#include "grid_sample.h"

#include <ATen/native/GridSamplerUtils.h>

#include <algorithm>
#include <cmath>

#include "pack.h"
#include "parallel.h"

namespace gradnorm_kernels::CPU_CAPABILITY {
namespace grid_sample {
namespace {

using at::Tensor;
using at::native::GridSamplerPadding;

constexpr int64_t kPoints = 64;  // located together
constexpr int64_t kGroups = 4;   // of channels, that one thread adds to
constexpr int64_t kFew = 4;      // channels, fewer of which are dealt with one by one

// In the place of a vector of channels, where too few of them are there to fill one.
template <class T>
struct OneChannel {
  using value_type = T;
  T value = 0;

  OneChannel() = default;
  explicit OneChannel(T value) : value(value) {}
  static constexpr int64_t size() {
    return 1;
  }
  static OneChannel loadu(const T* data) {
    return OneChannel(*data);
  }
  void store(T* data) const {
    *data = value;
  }
  friend OneChannel fmadd(OneChannel a, OneChannel b, OneChannel c) {
    return OneChannel(a.value * b.value + c.value);
  }
  friend T sum(OneChannel channel) {
    return channel.value;
  }
};
template <class T>
T sum(const at::vec::Vectorized<T>& channels) {
  return at::vec::vec_reduce_all<T>(std::plus<>(), channels);
}

// A coordinate in pixels, and its derivative.
template <class T>
std::pair<T, T> locate(T coordinate, int64_t size, GridSamplerPadding padding, bool align_corners) {
  T slope = static_cast<T>(align_corners ? size - 1 : size) / 2;
  const T low = align_corners ? 0 : T(-0.5), last = static_cast<T>(size - 1);
  T x = (coordinate + 1) * slope + low;
  if (padding == GridSamplerPadding::Zeros) {
    return {x, slope};
  }
  if (padding == GridSamplerPadding::Reflection) {
    // Between mirrors at low and half a turn from it.
    const T turn = 4 * slope;
    slope = x < low ? -slope : slope;
    x = std::abs(x - low);
    x -= std::trunc(x / turn) * turn;
    slope = x > turn - x ? -slope : slope;
    x = std::min(x, turn - x) + low;
  }
  if (!(x > 0)) {  // nor NaN
    return {0, 0};
  }
  return x < last ? std::pair<T, T>(x, slope) : std::pair<T, T>(last, 0);
}

// V: channels of a pixel or point that are dealt with together.
template <class V, int dims>
struct Call {
  using T = typename V::value_type;
  std::array<int64_t, dims> size;  // in the order of the coordinates: the last one first
  int64_t groups, pixels, points;
  GridSamplerPadding padding;
  bool align_corners;
  const T *grid, *grad_grad_grid, *input, *grad_grad_input, *grad_output;
  T *grad_grid, *grad_grad_output, *grad_input;
};

// Some points of a sample, and the corners of the cells that they are in: that of number k is the upper one
// of dimension d if bit d of k is set.
template <class T, int dims>
struct Cells {
  static constexpr int corners = 1 << dims;
  template <class S>
  using Each = std::array<S, kPoints>;

  int64_t count;
  Each<int64_t> pixel[corners];  // -1 outside of the input
  Each<T> share[dims][2];        // of the lower and the upper corner
  Each<T> slope[dims], step[dims];
  Each<T> weight[corners], change[corners];

  // The weight of a corner, differentiated by the dimensions whose bits are set.
  C10_ALWAYS_INLINE T weight_of(int corner, int differentiated, int64_t i) const {
    T product = 1;
    for (int d = 0; d < dims; ++d) {
      const bool upper = corner >> d & 1;
      product *= differentiated >> d & 1 ? T(upper ? 1 : -1) : share[d][upper][i];
    }
    return product;
  }

  template <class V>
  Cells(const Call<V, dims>& call, int64_t sample, int64_t first)
      : count(std::min(kPoints, call.points - first)) {
    Each<int64_t> lower[dims];
    for (int64_t i = 0; i < count; ++i) {
      const int64_t point = (sample * call.points + first + i) * dims;
      for (int d = 0; d < dims; ++d) {
        const auto [x, slope_of_x] =
            locate(call.grid[point + d], call.size[d], call.padding, call.align_corners);
        const T floor = std::floor(x);
        const bool is_near = floor >= -1 && floor < static_cast<T>(call.size[d]);
        lower[d][i] = is_near ? static_cast<int64_t>(floor) : -2;
        share[d][1][i] = x - floor;
        share[d][0][i] = 1 - share[d][1][i];
        slope[d][i] = slope_of_x;
        step[d][i] = slope_of_x * call.grad_grad_grid[point + d];
      }
    }
    for (int k = 0; k < corners; ++k) {
      for (int64_t i = 0; i < count; ++i) {
        int64_t offset = 0, stride = 1;
        bool is_inside = true;
        T along = 0;
        for (int d = 0; d < dims; ++d) {
          const int64_t index = lower[d][i] + (k >> d & 1);
          is_inside &= 0 <= index && index < call.size[d];
          offset += index * stride;
          stride *= call.size[d];
          along += step[d][i] * weight_of(k, 1 << d, i);
        }
        pixel[k][i] = is_inside ? offset : -1;
        weight[k][i] = weight_of(k, 0, i);
        change[k][i] = along;
      }
    }
  }
};

// What is each point's own: grad_grad_output and grad_grid.
template <bool has_v, class V, int dims>
void gather(const Call<V, dims>& call, int64_t sample, int64_t first) {
  using T = typename V::value_type;
  using C = Cells<T, dims>;
  const C cells(call, sample, first);
  // By dimension: the change of a corner's weight and, of the gradient by the grid, that weight.
  typename C::template Each<T> of_x[dims][C::corners], of_v[dims][C::corners];
  for (int d = 0; d < dims && call.grad_grid; ++d) {
    for (int k = 0; k < C::corners; ++k) {
      for (int64_t i = 0; i < cells.count; ++i) {
        T sum = 0;
        for (int other = 0; other < dims; ++other) {
          if (other != d) {
            sum += cells.step[other][i] * cells.weight_of(k, 1 << d | 1 << other, i);
          }
        }
        of_x[d][k][i] = cells.slope[d][i] * sum;
        of_v[d][k][i] = cells.slope[d][i] * cells.weight_of(k, 1 << d, i);
      }
    }
  }
  for (int64_t i = 0; i < cells.count; ++i) {
    const int64_t point = first + i;
    // Of the products with the gradient.
    std::array<V, C::corners> x_sums, v_sums;
    x_sums.fill(V(0));
    v_sums.fill(V(0));
    for (int64_t plane = sample * call.groups; plane < (sample + 1) * call.groups; ++plane) {
      const V g = V::loadu(call.grad_output + (plane * call.points + point) * V::size());
      V total(0);
      for (int k = 0; k < C::corners; ++k) {
        // Nothing is 0, not left out: of a point that is NaN the sum is NaN.
        const bool is_inside = cells.pixel[k][i] >= 0;
        const int64_t offset = (plane * call.pixels + cells.pixel[k][i]) * V::size();
        const V x = is_inside ? V::loadu(call.input + offset) : V(0);
        total = fmadd(x, V(cells.change[k][i]), total);
        x_sums[k] = fmadd(g, x, x_sums[k]);
        if constexpr (has_v) {
          const V v = is_inside ? V::loadu(call.grad_grad_input + offset) : V(0);
          total = fmadd(v, V(cells.weight[k][i]), total);
          v_sums[k] = fmadd(g, v, v_sums[k]);
        }
      }
      if (call.grad_grad_output) {
        total.store(call.grad_grad_output + (plane * call.points + point) * V::size());
      }
    }
    for (int d = 0; d < dims && call.grad_grid; ++d) {
      V grad(0);
      for (int k = 0; k < C::corners; ++k) {
        grad = fmadd(x_sums[k], V(of_x[d][k][i]), grad);
        if constexpr (has_v) {
          grad = fmadd(v_sums[k], V(of_v[d][k][i]), grad);
        }
      }
      call.grad_grid[(sample * call.points + point) * dims + d] = sum(grad);
    }
  }
}

// What several points add to: grad_input, of some groups of a sample's channels.
template <class V, int dims>
void scatter(const Call<V, dims>& call, int64_t sample, int64_t first_group) {
  using T = typename V::value_type;
  const int64_t end = std::min(first_group + kGroups, call.groups);
  for (int64_t first = 0; first < call.points; first += kPoints) {
    const Cells<T, dims> cells(call, sample, first);
    for (int64_t i = 0; i < cells.count; ++i) {
      for (int k = 0; k < cells.corners; ++k) {
        if (cells.pixel[k][i] < 0) {
          continue;
        }
        const V change(cells.change[k][i]);
        for (int64_t plane = sample * call.groups + first_group; plane < sample * call.groups + end;
             ++plane) {
          const V g = V::loadu(call.grad_output + (plane * call.points + first + i) * V::size());
          T* const grad = call.grad_input + (plane * call.pixels + cells.pixel[k][i]) * V::size();
          fmadd(g, change, V::loadu(grad)).store(grad);
        }
      }
    }
  }
}

// fn(sample, first) for every group of `size` of each sample's n. What a group computes does not depend on
// the number of threads.
template <class Fn>
void for_each_group(int64_t samples, int64_t n, int64_t size, int64_t cost, const Fn& fn) {
  const int64_t groups = (n + size - 1) / size;
  const int64_t grain = std::max<int64_t>(1, at::internal::GRAIN_SIZE / cost);
  parallel_for(0, samples * groups, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      fn(i / groups, i % groups * size);
    }
  });
}

template <class V, int dims>
void run(const Call<V, dims>& call, int64_t samples) {
  const int64_t cost = (1 << dims) * call.groups * V::size();  // of a point
  if (call.grad_grad_output || call.grad_grid) {
    for_each_group(samples, call.points, kPoints, kPoints * cost, [&](int64_t sample, int64_t first) {
      (call.grad_grad_input ? gather<true, V, dims> : gather<false, V, dims>)(call, sample, first);
    });
  }
  if (call.grad_input) {
    for_each_group(samples, call.groups, kGroups, call.points * cost, [&](int64_t sample, int64_t first) {
      scatter(call, sample, first);
    });
  }
}

// Tensors (N, C, M) of M pixels or points as (N, groups, M, channels of a vector), with zeros where the last
// group has no channel: so a vector is loaded where a pixel is, and its channels are not gathered.
template <class V>
class Grouping {
 public:
  using T = typename V::value_type;

  explicit Grouping(const Tensor& planes)
      : samples_(planes.size(0)), channels_(planes.size(1)), groups_((channels_ + lanes - 1) / lanes) {}

  int64_t groups() const {
    return groups_;
  }
  Tensor empty(const Tensor& planes) const {
    return lanes == 1         ? planes
           : planes.defined() ? at::empty({samples_, groups_, positions(planes), lanes}, planes.options())
                              : Tensor();
  }
  Tensor group(const Tensor& planes) const {
    const Tensor grouped = empty(planes);
    if (planes.defined() && lanes > 1) {
      const T* const from = const_data<T>(planes);
      T* const to = mutable_data<T>(grouped);
      each_tile(
          positions(planes), [=](int64_t in_planes, int64_t in_groups, int64_t n, int filled, int count) {
            if (filled < lanes) {
              std::fill_n(to + in_groups, count * lanes, T(0));
            }
            at::vec::transpose_mxn<T>(from + in_planes, n, to + in_groups, lanes, filled, count);
          });
    }
    return grouped;
  }
  void ungroup(const Tensor& planes, const Tensor& grouped) const {
    if (planes.defined() && lanes > 1) {
      const T* const from = const_data<T>(grouped);
      T* const to = mutable_data<T>(planes);
      each_tile(
          positions(planes), [=](int64_t in_planes, int64_t in_groups, int64_t n, int filled, int count) {
            at::vec::transpose_mxn<T>(from + in_groups, lanes, to + in_planes, n, count, filled);
          });
    }
  }

 private:
  static constexpr int64_t lanes = V::size();

  int64_t positions(const Tensor& planes) const {
    return planes.numel() / (samples_ * channels_);
  }
  // tile(offset in planes, offset in groups, positions, channels, positions in the tile)
  template <class Tile>
  void each_tile(int64_t n, const Tile& tile) const {
    for_each_group(samples_ * groups_, n, kPoints, kPoints * lanes, [&](int64_t plane, int64_t first) {
      const int64_t channel = plane % groups_ * lanes;
      tile(
          (plane / groups_ * channels_ + channel) * n + first, (plane * n + first) * lanes, n,
          static_cast<int>(std::min(lanes, channels_ - channel)),
          static_cast<int>(std::min(kPoints, n - first)));
    });
  }

  int64_t samples_, channels_, groups_;
};

void double_backward(
    const Tensor& grad_grad_output, const Tensor& grad_input, const Tensor& grad_grid,
    const Tensor& grad_grad_input, const Tensor& grad_grad_grid, const Tensor& grad_output,
    const GridSample& of) {
  const auto run_in = [&]<class V, int dims>() {
    using T = typename V::value_type;
    const Grouping<V> channels(of.input);
    const Tensor x = channels.group(of.input), v = channels.group(grad_grad_input),
                 g = channels.group(grad_output);
    const Tensor to_g = channels.empty(grad_grad_output), to_x = channels.empty(grad_input);
    if (to_x.defined()) {
      to_x.zero_();
    }
    Call<V, dims> call{
        .groups = channels.groups(),
        .points = grad_grad_grid.numel() / (of.input.size(0) * dims),
        .padding = static_cast<GridSamplerPadding>(of.padding),
        .align_corners = of.align_corners,
        .grid = const_data<T>(of.grid),
        .grad_grad_grid = const_data<T>(grad_grad_grid),
        .input = const_data<T>(x),
        .grad_grad_input = const_data<T>(v),
        .grad_output = const_data<T>(g),
        .grad_grid = mutable_data<T>(grad_grid),
        .grad_grad_output = mutable_data<T>(to_g),
        .grad_input = mutable_data<T>(to_x)};
    call.pixels = 1;
    for (int d = 0; d < dims; ++d) {
      call.size[d] = of.input.size(-1 - d);
      call.pixels *= call.size[d];
    }
    run(call, of.input.size(0));
    channels.ungroup(grad_grad_output, to_g);
    channels.ungroup(grad_input, to_x);
  };
  AT_DISPATCH_FLOATING_TYPES(of.input.scalar_type(), "gradnorm_kernels", [&] {
    const auto run_of = [&]<class V>() {
      of.input.dim() == 4 ? run_in.template operator()<V, 2>() : run_in.template operator()<V, 3>();
    };
    of.input.size(1) < kFew ? run_of.template operator()<OneChannel<scalar_t>>()
                            : run_of.template operator()<at::vec::Vectorized<scalar_t>>();
  });
}

}  // namespace
}  // namespace grid_sample

const GridSampleKernels grid_sample_kernels{grid_sample::double_backward};

}  // namespace gradnorm_kernels::CPU_CAPABILITY
