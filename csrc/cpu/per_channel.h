// One vectorised loop for every CPU kernel that is elementwise but for coefficients and sums of each channel.
#pragma once

#include <ATen/Parallel.h>

#include <vector>

#include "batch_norm.h"
#include "pack.h"
#include "parallel.h"

namespace gradnorm_kernels::CPU_CAPABILITY {

// Fn is called with vectors of the inputs, of the channels' coefficients, and of the outputs and sums, of
// which it writes the former and adds to the latter. What it adds must be 0 where the inputs are.
template <class T, size_t Inputs, size_t Outputs, size_t Coefficients, size_t Sums>
struct ChannelLoop {
  using P = Pack<T>;
  using Scalar = typename P::Scalar;
  std::array<const T*, Inputs> inputs;
  std::array<T*, Outputs> outputs;

  // Of n neighbouring elements of one channel, whose coefficients and totals are `stride` and `total_stride`
  // apart. Sums are taken in opmath_t over `run` elements, and added to the totals.
  template <class Fn>
  void along(
      int64_t offset, int64_t n, int64_t run, const Scalar* coefficients, int64_t stride, double* totals,
      int64_t total_stride, const Fn& fn) const {
    // A copy, which lives in registers: for all the compiler knows, a store may change the original.
    const ChannelLoop loop = *this;
    std::array<P, Coefficients> own;
    for (size_t k = 0; k < Coefficients; ++k) {
      own[k] = P(coefficients[k * stride]);
    }
    for (int64_t start = 0; start < n; start += run) {
      std::array<P, Sums> sums;
      for_each_pack<P, P::Vector::size()>(std::min(run, n - start), [&](int64_t i, auto count) {
        loop.template apply<true>(offset + start + i, count, own, sums, fn);
      });
      for (size_t k = 0; k < Sums; ++k) {
        totals[k * total_stride] += sums[k].sum();
      }
    }
  }

  // Of rows of all channels. Coefficients and sums are arrays along the channels, `stride` apart.
  template <class Fn>
  void across(
      int64_t offset, int64_t rows, int64_t channels, const Scalar* coefficients, Scalar* sums,
      int64_t stride, const Fn& fn) const {
    const ChannelLoop loop = *this;
    // So many rows have coefficients and sums in registers.
    constexpr int64_t together = 4;
    for (int64_t first = 0; first < rows; first += together) {
      const int64_t end = std::min(first + together, rows);
      for_each_pack<P, P::Vector::size()>(channels, [&](int64_t c, auto count) {
        std::array<P, Coefficients> own;
        for (size_t k = 0; k < Coefficients; ++k) {
          own[k] = P::load(coefficients + k * stride + c, count);
        }
        std::array<P, Sums> totals;
        for (size_t k = 0; k < Sums; ++k) {
          totals[k] = P::load(sums + k * stride + c, count);
        }
        for (int64_t row = first; row < end; ++row) {
          loop.template apply<false>(offset + row * channels + c, count, own, totals, fn);
        }
        for (size_t k = 0; k < Sums; ++k) {
          totals[k].store(sums + k * stride + c, count);
        }
      });
    }
  }

 private:
  template <bool one_channel, class Count, class Fn>
  void apply(
      int64_t offset, Count count, const std::array<P, Coefficients>& coefficients, std::array<P, Sums>& sums,
      const Fn& fn) const {
    std::array<P, Inputs> in;
    for (size_t k = 0; k < Inputs; ++k) {
      in[k] = P::load(inputs[k] + offset, count);
    }
    std::array<P, Outputs> out;
    const auto apply_to_part = [&](size_t k) C10_ALWAYS_INLINE_ATTRIBUTE {
      const size_t own = one_channel ? 0 : k;
      auto out_part = part_of(out, k);
      auto sums_part = part_of(sums, own);
      fn(part_of(in, k), part_of(coefficients, own), out_part, sums_part);
      set_part(out, k, out_part);
      set_part(sums, own, sums_part);
    };
    if constexpr (std::is_same_v<Count, std::integral_constant<int64_t, P::size>>) {
      P::for_each_part(apply_to_part);
    } else {
      apply_to_part(0);  // no more than one vector
    }
    for (size_t k = 0; k < Outputs; ++k) {
      out[k].store(outputs[k] + offset, count);
    }
  }
};

// A pass over the channels [begin, end) of some tensors.
template <class T, size_t Inputs, size_t Outputs, size_t Coefficients, size_t Sums>
class ChannelPass {
  using P = Pack<T>;
  using Scalar = typename P::Scalar;
  using Loop = ChannelLoop<T, Inputs, Outputs, Coefficients, Sums>;

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
      coefficients_[k * channels_ + c] = static_cast<Scalar>(values[k]);
    }
  }
  double sum(int64_t c, size_t k) const {
    return sums_[k * channels_ + c];
  }

  template <class Fn>
  void run(const std::array<const T*, Inputs>& inputs, const std::array<T*, Outputs>& outputs, const Fn& fn) {
    const Loop loop{inputs, outputs};
    if (layout_.inner == 1) {
      run_across_channels(loop, fn);
    } else {
      run_along_inner(loop, fn);
    }
  }

 private:
  template <class Fn>
  void run_along_inner(const Loop& loop, const Fn& fn) {
    constexpr int64_t in_opmath = 32 * P::Vector::size();
    for (int64_t n = 0; n < layout_.outer; ++n) {
      for (int64_t c = 0; c < channels_; ++c) {
        loop.along(
            (n * layout_.channels + begin_ + c) * layout_.inner, layout_.inner, in_opmath,
            coefficients_.data() + c, channels_, sums_.data() + c, channels_, fn);
      }
    }
  }

  // The rows are cut into chunks by their number alone: however many threads there are, the bits are the
  // same.
  template <class Fn>
  void run_across_channels(const Loop& loop, const Fn& fn) {
    constexpr int64_t least_rows = 128, most_chunks = 256, in_opmath = 32;
    const int64_t chunks = std::clamp(layout_.outer / least_rows, static_cast<int64_t>(1), most_chunks);
    std::vector<double> partial(chunks * sums_.size());
    gradnorm_kernels::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
      std::vector<Scalar> running(sums_.size());
      for (int64_t chunk = first; chunk < last; ++chunk) {
        const int64_t end = layout_.outer * (chunk + 1) / chunks;
        for (int64_t row = layout_.outer * chunk / chunks; row < end; row += in_opmath) {
          loop.across(
              row * channels_, std::min(in_opmath, end - row), channels_, coefficients_.data(),
              running.data(), channels_, fn);
          for (size_t i = 0; i < running.size(); ++i) {
            partial[chunk * running.size() + i] += running[i];
            running[i] = 0;
          }
        }
      }
    });
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      for (size_t i = 0; i < sums_.size(); ++i) {
        sums_[i] += partial[chunk * sums_.size() + i];
      }
    }
  }

  const ChannelLayout& layout_;
  int64_t begin_, channels_;
  std::vector<Scalar> coefficients_;
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

}  // namespace gradnorm_kernels::CPU_CAPABILITY
