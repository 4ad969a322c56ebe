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
constexpr int64_t kPlanes = 8;   // that one thread adds to

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

template <class T, int dims>
struct Call {
  std::array<int64_t, dims> size;  // in the order of the coordinates: the last one first
  int64_t channels, pixels, points;
  GridSamplerPadding padding;
  bool align_corners;
  const T *input, *grid, *grad_grad_input, *grad_grad_grid, *grad_output;
  T *grad_grad_output, *grad_input, *grad_grid;
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

  Cells(const Call<T, dims>& call, int64_t sample, int64_t first)
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
template <bool has_v, class T, int dims>
void gather(const Call<T, dims>& call, int64_t sample, int64_t first) {
  using C = Cells<T, dims>;
  const C cells(call, sample, first);
  // Over the channels, of the products with the gradient.
  typename C::template Each<T> x_sums[C::corners] = {}, v_sums[C::corners] = {};
  for (int64_t channel = 0; channel < call.channels; ++channel) {
    const int64_t plane = sample * call.channels + channel;
    const T* const x = call.input + plane * call.pixels;
    const T* const v = has_v ? call.grad_grad_input + plane * call.pixels : nullptr;
    const T* const g = call.grad_output + plane * call.points + first;
    typename C::template Each<T> total = {};
    for (int k = 0; k < C::corners; ++k) {
      for (int64_t i = 0; i < cells.count; ++i) {
        const int64_t pixel = cells.pixel[k][i];
        const T x_k = pixel < 0 ? T(0) : x[pixel];
        total[i] += x_k * cells.change[k][i];
        x_sums[k][i] += g[i] * x_k;
        if constexpr (has_v) {
          const T v_k = pixel < 0 ? T(0) : v[pixel];
          total[i] += v_k * cells.weight[k][i];
          v_sums[k][i] += g[i] * v_k;
        }
      }
    }
    if (call.grad_grad_output) {
      std::copy_n(total.data(), cells.count, call.grad_grad_output + plane * call.points + first);
    }
  }
  if (!call.grad_grid) {
    return;
  }
  for (int64_t i = 0; i < cells.count; ++i) {
    for (int d = 0; d < dims; ++d) {
      T sum = 0;
      for (int k = 0; k < C::corners; ++k) {
        T of_x = 0;
        for (int other = 0; other < dims; ++other) {
          if (other != d) {
            of_x += cells.step[other][i] * cells.weight_of(k, 1 << d | 1 << other, i);
          }
        }
        sum += x_sums[k][i] * of_x;
        if constexpr (has_v) {
          sum += v_sums[k][i] * cells.weight_of(k, 1 << d, i);
        }
      }
      call.grad_grid[(sample * call.points + first + i) * dims + d] = cells.slope[d][i] * sum;
    }
  }
}

// What several points add to: grad_input, of some channels of a sample.
template <class T, int dims>
void scatter(const Call<T, dims>& call, int64_t sample, int64_t first_channel) {
  const int64_t end = std::min(first_channel + kPlanes, call.channels);
  for (int64_t first = 0; first < call.points; first += kPoints) {
    const Cells<T, dims> cells(call, sample, first);
    for (int64_t plane = sample * call.channels + first_channel; plane < sample * call.channels + end;
         ++plane) {
      const T* const g = call.grad_output + plane * call.points + first;
      T* const grad = call.grad_input + plane * call.pixels;
      for (int k = 0; k < cells.corners; ++k) {
        for (int64_t i = 0; i < cells.count; ++i) {
          if (cells.pixel[k][i] >= 0) {
            grad[cells.pixel[k][i]] += g[i] * cells.change[k][i];
          }
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

template <class T, int dims>
void run(const Call<T, dims>& call, int64_t samples) {
  const int64_t cost = Cells<T, dims>::corners * call.channels;  // of a point
  if (call.grad_grad_output || call.grad_grid) {
    for_each_group(samples, call.points, kPoints, kPoints * cost, [&](int64_t sample, int64_t first) {
      (call.grad_grad_input ? gather<true, T, dims> : gather<false, T, dims>)(call, sample, first);
    });
  }
  if (call.grad_input) {
    for_each_group(samples, call.channels, kPlanes, call.points * cost, [&](int64_t sample, int64_t first) {
      scatter(call, sample, first);
    });
  }
}

void double_backward(
    const Tensor& grad_grad_output, const Tensor& grad_input, const Tensor& grad_grid,
    const Tensor& grad_grad_input, const Tensor& grad_grad_grid, const Tensor& grad_output,
    const GridSample& of) {
  const auto run_in = [&]<class T, int dims>() {
    Call<T, dims> call{
        .channels = of.input.size(1),
        .points = grad_grad_grid.numel() / (of.input.size(0) * dims),
        .padding = static_cast<GridSamplerPadding>(of.padding),
        .align_corners = of.align_corners,
        .input = const_data<T>(of.input),
        .grid = const_data<T>(of.grid),
        .grad_grad_input = const_data<T>(grad_grad_input),
        .grad_grad_grid = const_data<T>(grad_grad_grid),
        .grad_output = const_data<T>(grad_output),
        .grad_grad_output = mutable_data<T>(grad_grad_output),
        .grad_input = mutable_data<T>(grad_input),
        .grad_grid = mutable_data<T>(grad_grid)};
    call.pixels = 1;
    for (int d = 0; d < dims; ++d) {
      call.size[d] = of.input.size(-1 - d);
      call.pixels *= call.size[d];
    }
    run(call, of.input.size(0));
  };
  AT_DISPATCH_FLOATING_TYPES(of.input.scalar_type(), "gradnorm_kernels", [&] {
    of.input.dim() == 4 ? run_in.template operator()<scalar_t, 2>()
                        : run_in.template operator()<scalar_t, 3>();
  });
}

}  // namespace
}  // namespace grid_sample

const GridSampleKernels grid_sample_kernels{grid_sample::double_backward};

}  // namespace gradnorm_kernels::CPU_CAPABILITY
