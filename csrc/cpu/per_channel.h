// One vectorised loop for every CPU kernel that is elementwise but for coefficients and sums of each channel.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>

#include <algorithm>
#include <array>
#include <functional>
#include <vector>

#include "batch_norm.h"
#include "parallel.h"

namespace gradnorm_kernels {
namespace CPU_CAPABILITY {

// count elements, at most one vector of opmath_t, as that; the lanes beyond them are 0.
template <class T>
at::vec::Vectorized<at::opmath_type<T>> load(const T* data, int64_t count) {
  const auto vector = at::vec::Vectorized<T>::loadu(data, count);
  if constexpr (c10::is_reduced_floating_point_v<T>) {
    return std::get<0>(at::vec::convert_to_float<T>(vector));
  } else {
    return vector;
  }
}

template <class T>
void store(T* data, const at::vec::Vectorized<at::opmath_type<T>>& vector, int64_t count) {
  if constexpr (c10::is_reduced_floating_point_v<T>) {
    at::vec::convert_from_float<T>(vector, vector).store(data, count);
  } else {
    vector.store(data, count);
  }
}

// A pass over the channels [begin, end) of some tensors.
//
// Fn is called with vectors of the inputs, of the channel's coefficients, and of the outputs and sums, of
// which it writes the former and adds to the latter. What it adds must be 0 where the inputs are.
template <class T, size_t Inputs, size_t Outputs, size_t Coefficients, size_t Sums>
class ChannelPass {
  using V = at::vec::Vectorized<at::opmath_type<T>>;
  template <size_t N>
  using Vectors = std::array<V, N>;
  static constexpr int64_t kWidth = V::size();
  // Elements added in opmath_t before a sum is continued in double.
  static constexpr int64_t kRun = 32 * kWidth;

 public:
  ChannelPass(const ChannelLayout& layout, int64_t begin, int64_t end)
      : layout_(layout),
        begin_(begin),
        channels_(end - begin),
        coefficients_(Coefficients * channels_),
        sums_(Sums * channels_) {}

  // Of channel begin + c.
  void set(int64_t c, const std::array<double, Coefficients>& values) {
    for (size_t k = 0; k < Coefficients; ++k) {
      coefficients_[k * channels_ + c] = static_cast<at::opmath_type<T>>(values[k]);
    }
  }
  double sum(int64_t c, size_t k) const {
    return sums_[k * channels_ + c];
  }

  template <class Fn>
  void run(const std::array<const T*, Inputs>& inputs, const std::array<T*, Outputs>& outputs, const Fn& fn) {
    if (layout_.inner == 1) {
      run_across_channels(inputs, outputs, fn);
    } else {
      run_along_inner(inputs, outputs, fn);
    }
  }

 private:
  template <class Fn>
  static void apply(
      const std::array<const T*, Inputs>& inputs, const std::array<T*, Outputs>& outputs, int64_t offset,
      int64_t count, const Vectors<Coefficients>& coefficients, Vectors<Sums>& sums, const Fn& fn) {
    Vectors<Inputs> in;
    for (size_t k = 0; k < Inputs; ++k) {
      in[k] = load(inputs[k] + offset, count);
    }
    Vectors<Outputs> out;
    fn(in, coefficients, out, sums);
    for (size_t k = 0; k < Outputs; ++k) {
      store(outputs[k] + offset, out[k], count);
    }
  }

  template <class Fn>
  void run_along_inner(
      const std::array<const T*, Inputs>& inputs, const std::array<T*, Outputs>& outputs, const Fn& fn) {
    Vectors<Coefficients> coefficients;
    for (int64_t n = 0; n < layout_.outer; ++n) {
      for (int64_t c = 0; c < channels_; ++c) {
        for (size_t k = 0; k < Coefficients; ++k) {
          coefficients[k] = V(coefficients_[k * channels_ + c]);
        }
        const int64_t row = (n * layout_.channels + begin_ + c) * layout_.inner, end = row + layout_.inner;
        for (int64_t i = row; i < end;) {
          Vectors<Sums> sums;
          sums.fill(V(0));
          const int64_t stop = std::min(i + kRun, end);
          for (; i + kWidth <= stop; i += kWidth) {
            apply(inputs, outputs, i, kWidth, coefficients, sums, fn);
          }
          if (i < stop) {
            apply(inputs, outputs, i, stop - i, coefficients, sums, fn);
            i = stop;
          }
          for (size_t k = 0; k < Sums; ++k) {
            sums_[k * channels_ + c] += at::vec::vec_reduce_all<at::opmath_type<T>>(
                [](const V& a, const V& b) { return a + b; }, sums[k]);
          }
        }
      }
    }
  }

  // The rows are cut into chunks by their number alone: however many threads there are, the bits are the
  // same.
  template <class Fn>
  void run_across_channels(
      const std::array<const T*, Inputs>& inputs, const std::array<T*, Outputs>& outputs, const Fn& fn) {
    constexpr int64_t least_rows = 128, most_chunks = 256;
    const int64_t chunks = std::clamp(layout_.outer / least_rows, static_cast<int64_t>(1), most_chunks);
    std::vector<double> partial(chunks * Sums * channels_);
    gradnorm_kernels::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
      for (int64_t chunk = first; chunk < last; ++chunk) {
        add_rows(
            layout_.outer * chunk / chunks, layout_.outer * (chunk + 1) / chunks, inputs, outputs,
            partial.data() + chunk * Sums * channels_, fn);
      }
    });
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const double* terms = partial.data() + chunk * Sums * channels_;
      for (size_t i = 0; i < sums_.size(); ++i) {
        sums_[i] += terms[i];
      }
    }
  }

  template <class Fn>
  void add_rows(
      int64_t begin, int64_t end, const std::array<const T*, Inputs>& inputs,
      const std::array<T*, Outputs>& outputs, double* total, const Fn& fn) const {
    // Coefficients and sums stay in registers for that many rows.
    constexpr int64_t together = 4;
    std::vector<at::opmath_type<T>> running(Sums * channels_);
    int64_t pending = 0;
    for (int64_t row = begin; row < end; row += together) {
      const int64_t stop = std::min(row + together, end);
      for (int64_t c = 0; c < channels_; c += kWidth) {
        const int64_t count = std::min(kWidth, channels_ - c);
        if (count == kWidth) {
          add_column(row, stop, c, kWidth, inputs, outputs, running.data(), fn);
        } else {
          add_column(row, stop, c, count, inputs, outputs, running.data(), fn);
        }
      }
      pending += together;
      if (Sums > 0 && (pending >= 32 || stop == end)) {
        for (size_t i = 0; i < running.size(); ++i) {
          total[i] += running[i];
          running[i] = 0;
        }
        pending = 0;
      }
    }
  }

  template <class Fn>
  void add_column(
      int64_t row, int64_t stop, int64_t c, int64_t count, const std::array<const T*, Inputs>& inputs,
      const std::array<T*, Outputs>& outputs, at::opmath_type<T>* running, const Fn& fn) const {
    Vectors<Coefficients> coefficients;
    for (size_t k = 0; k < Coefficients; ++k) {
      coefficients[k] = V::loadu(coefficients_.data() + k * channels_ + c, count);
    }
    Vectors<Sums> sums;
    for (size_t k = 0; k < Sums; ++k) {
      sums[k] = V::loadu(running + k * channels_ + c, count);
    }
    for (; row < stop; ++row) {
      apply(inputs, outputs, row * channels_ + c, count, coefficients, sums, fn);
    }
    for (size_t k = 0; k < Sums; ++k) {
      sums[k].store(running + k * channels_ + c, count);
    }
  }

  const ChannelLayout& layout_;
  int64_t begin_, channels_;
  std::vector<at::opmath_type<T>> coefficients_;
  std::vector<double> sums_;
};

// Calls fn(begin, end) for blocks of channels, in parallel. A block is few enough channels that what one
// pass over it has read is still in the cache for the next one, but rows of a few kilobytes at least.
// Channels that are interleaved (inner = 1) are one block, whose passes are parallel themselves.
template <class Fn>
void for_channel_blocks(const ChannelLayout& layout, const Fn& fn) {
  if (layout.inner == 1) {
    fn(int64_t{0}, layout.channels);
    return;
  }
  const int64_t share = std::max(layout.channels / at::get_num_threads(), int64_t{1});
  const int64_t block = std::clamp(1024 / layout.inner, int64_t{1}, share);
  const int64_t blocks = (layout.channels + block - 1) / block;
  gradnorm_kernels::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      fn(b * block, std::min((b + 1) * block, layout.channels));
    }
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace gradnorm_kernels
