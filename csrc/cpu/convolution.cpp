#include "convolution.h"

#include <ATen/Parallel.h>

#include <vector>

#include "buffer.h"
#include "pack.h"
#include "parallel.h"

namespace gradnorm_kernels::CPU_CAPABILITY {
namespace convolution {
namespace {

// Tasks to aim at. Where channels are too few, images are summed in parts, and these in a fixed order: the
// result does not depend on the number of threads.
constexpr int64_t kTasks = 128;
// A row of the kernel is worked through in pieces whose sums stay in registers.
constexpr int64_t kMaxTaps = 8;
// Bytes of rows that are gone through once for each row of the kernel, and should stay in the first cache.
constexpr int64_t kCacheBytes = 16384;

// Tasks work on copies of an image, in which a vector holds neighbouring pixels of one channel (contiguous)
// or one pixel of neighbouring channels (channels_last), and the input is padded with zeros. All positions
// of the output then meet all taps, and row by row
//     sums[tap] += grad_output[vector i] * input[i * step + offsets[tap]].
struct Plan {
  struct Copy {
    int64_t height, width, rows, columns;  // of the image, and copied
    int64_t top, left;                     // of the copy
    int64_t stride;                        // columns that become neighbours in the copy, if contiguous
    int64_t row;                           // elements of a row of the copy
  };

  Plan(
      const at::Tensor& grad_output, const at::Tensor& input, bool channels_last, at::IntArrayRef kernel_size,
      const ConvolutionGeometry& geometry, int64_t width)
      : width(width),
        channels_last(channels_last),
        channels(input.size(1)),
        kernel_height(kernel_size[0]),
        kernel_width(kernel_size[1]),
        stride_y(geometry.stride[0]),
        dilation_y(geometry.dilation[0]),
        stride_x(geometry.stride[1]) {
    const int64_t out_height = grad_output.size(2), out_width = grad_output.size(3);
    const int64_t reach = (kernel_width - 1) * geometry.dilation[1];
    block = channels_last ? width : 1;
    blocks = at::divup(channels, block);
    parts = std::clamp<int64_t>(kTasks / blocks, 1, input.size(0));
    padded_height = (out_height - 1) * stride_y + (kernel_height - 1) * dilation_y + 1;
    const int64_t padded_width = (out_width - 1) * stride_x + reach + 1;
    int64_t row;
    if (channels_last) {
      vectors = out_width;
      step = stride_x * width;
      row = padded_width * width;
    } else {
      vectors = at::divup(out_width, width);
      tail = out_width % width;
      step = width;
      phase = at::divup(vectors * width + reach / stride_x, width) * width;
      row = stride_x * phase;
    }
    const auto [top, left] = geometry.padding;
    const int64_t in_height = input.size(2), in_width = input.size(3);
    this->input = {
        in_height,
        in_width,
        std::clamp<int64_t>(padded_height - top, 0, in_height),
        std::clamp<int64_t>(padded_width - left, 0, in_width),
        top,
        left,
        stride_x,
        row};
    gradient = {out_height, out_width, out_height, out_width, 0, 0, 1, vectors * width};
    for (int64_t tap = 0; tap < kernel_width; ++tap) {
      offsets.push_back(position(tap * geometry.dilation[1]));
    }
  }

  // Where a padded column is in a row of the copy. Where a vector holds pixels, columns of one remainder
  // modulo the stride are neighbours: a load is those of one tap.
  int64_t position(int64_t column) const {
    return channels_last ? column * width : column % stride_x * phase + column / stride_x;
  }

  int64_t width;  // elements of a vector
  bool channels_last;
  int64_t channels, kernel_height, kernel_width, stride_y, dilation_y, stride_x, padded_height;
  int64_t block, blocks, parts;  // channels of a task, and how many tasks there are for channels and images
  int64_t vectors, tail = 0, step;  // of a row of grad_output; pixels of its last vector if not all
  int64_t phase = 0;                // elements of the columns of one remainder
  Copy input, gradient;
  std::vector<int64_t> offsets;
};

template <class T>
void pack(const Plan& plan, const Plan::Copy& copy, const T* image, int64_t channel, T* target) {
  target += copy.top * copy.row;
  const int64_t lanes = std::min(plan.width, plan.channels - channel);
  for (int64_t y = 0; y < copy.rows; ++y, target += copy.row) {
    if (plan.channels_last) {
      const T* pixel = image + y * copy.width * plan.channels + channel;
      T* vector = target + copy.left * plan.width;
      for (int64_t x = 0; x < copy.columns; ++x, pixel += plan.channels, vector += plan.width) {
        Pack<T>::load(pixel, lanes).store(vector, Pack<T>::size);
      }
      continue;
    }
    const T* pixels = image + (channel * copy.height + y) * copy.width;
    if (copy.stride == 1) {
      std::copy_n(pixels, copy.columns, target + copy.left);
      continue;
    }
    for (int64_t first = 0; first < std::min(copy.stride, copy.columns); ++first) {
      T* neighbour = target + plan.position(copy.left + first);
      for (int64_t x = first; x < copy.columns; x += copy.stride) {
        *neighbour++ = pixels[x];
      }
    }
  }
}

template <class T, int64_t taps>
void accumulate(
    const Plan& plan, const int64_t* offsets, int64_t rows, const T* gradient, const T* input, T* sums) {
  using Vec = typename Pack<T>::Vector;
  constexpr int64_t width = Vec::size();
  const int64_t whole = plan.vectors - (plan.tail != 0);
  const auto mask = Vec::arange(T(0), T(1)) < Vec(T(plan.tail));
  std::array<Vec, taps> total;
  for (int64_t tap = 0; tap < taps; ++tap) {
    total[tap] = Vec::loadu(sums + tap * width);
  }
  for (int64_t y = 0; y < rows; ++y) {
    for (int64_t i = 0; i < whole; ++i) {
      const auto g = Vec::loadu(gradient + i * width);
      for (int64_t tap = 0; tap < taps; ++tap) {
        const auto x = Vec::loadu(input + i * plan.step + offsets[tap]);
        total[tap] = at::vec::fmadd(g, x, total[tap]);
      }
    }
    if (plan.tail) {
      const auto g = Vec::loadu(gradient + whole * width);
      for (int64_t tap = 0; tap < taps; ++tap) {
        // Pixels that meet no gradient at this tap may be infinite, and are not to be multiplied by 0.
        const auto x = Vec::loadu(input + whole * plan.step + offsets[tap]) & mask;
        total[tap] = at::vec::fmadd(g, x, total[tap]);
      }
    }
    gradient += plan.gradient.row;
    input += plan.stride_y * plan.input.row;
  }
  for (int64_t tap = 0; tap < taps; ++tap) {
    total[tap].store(sums + tap * width);
  }
}

template <class T, size_t... indices>
void accumulate_image(
    const Plan& plan, const T* gradient, const T* input, T* sums, std::index_sequence<indices...>) {
  constexpr decltype(&accumulate<T, 1>) accumulate_taps[] = {accumulate<T, indices + 1>...};
  const int64_t out_height = plan.gradient.rows;
  const int64_t rows_at_once = std::max<int64_t>(1, kCacheBytes / (plan.input.row * sizeof(T)));
  for (int64_t y = 0; y < out_height; y += rows_at_once) {
    const int64_t rows = std::min(rows_at_once, out_height - y);
    for (int64_t ky = 0; ky < plan.kernel_height; ++ky) {
      const T* first_row = input + (y * plan.stride_y + ky * plan.dilation_y) * plan.input.row;
      for (int64_t kx = 0; kx < plan.kernel_width; kx += kMaxTaps) {
        const int64_t taps = std::min(kMaxTaps, plan.kernel_width - kx);
        accumulate_taps[taps - 1](
            plan, plan.offsets.data() + kx, rows, gradient + y * plan.gradient.row, first_row,
            sums + (ky * plan.kernel_width + kx) * plan.width);
      }
    }
  }
}

template <class T>
void sum_parts(const Plan& plan, const T* grad_output, const T* input, int64_t images, T* parts) {
  const int64_t taps = plan.kernel_height * plan.kernel_width;
  gradnorm_kernels::parallel_for(0, plan.parts * plan.blocks, 1, [&](int64_t begin, int64_t end) {
    // What pack leaves out stays zero. A vector more: the last of a row may reach past its end.
    const auto padded = zeros<T>(plan.padded_height * plan.input.row + plan.width);
    const auto gradient = zeros<T>(plan.gradient.rows * plan.gradient.row);
    const auto sums = zeros<T>(taps * plan.width);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task / plan.blocks, channel = task % plan.blocks * plan.block;
      std::fill_n(sums.get(), taps * plan.width, T(0));
      for (int64_t n = part * images / plan.parts; n < (part + 1) * images / plan.parts; ++n) {
        const int64_t first = n * plan.channels;
        pack(plan, plan.input, input + first * plan.input.height * plan.input.width, channel, padded.get());
        pack(
            plan, plan.gradient, grad_output + first * plan.gradient.height * plan.gradient.width, channel,
            gradient.get());
        accumulate_image(
            plan, gradient.get(), padded.get(), sums.get(), std::make_index_sequence<kMaxTaps>());
      }
      T* result = parts + (part * plan.channels + channel) * taps;
      for (int64_t tap = 0; tap < taps; ++tap) {
        const T* lanes = sums.get() + tap * plan.width;
        if (plan.channels_last) {
          for (int64_t c = 0; c < std::min(plan.block, plan.channels - channel); ++c) {
            result[c * taps + tap] = lanes[c];
          }
        } else {
          result[tap] = Pack<T>::load(lanes, Pack<T>::size).sum();
        }
      }
    }
  });
}

at::Tensor depthwise_grad_weight(
    const at::Tensor& grad_output, const at::Tensor& input, bool channels_last, at::IntArrayRef kernel_size,
    const ConvolutionGeometry& geometry) {
  return AT_DISPATCH_FLOATING_TYPES(input.scalar_type(), "depthwise_grad_weight", [&] {
    const Plan plan(grad_output, input, channels_last, kernel_size, geometry, Pack<scalar_t>::size);
    const at::Tensor parts =
        at::empty({plan.parts, plan.channels, kernel_size[0], kernel_size[1]}, input.options());
    sum_parts(
        plan, grad_output.const_data_ptr<scalar_t>(), input.const_data_ptr<scalar_t>(), input.size(0),
        parts.data_ptr<scalar_t>());
    return parts.sum(0);
  });
}

}  // namespace
}  // namespace convolution

const ConvolutionKernels convolution_kernels{convolution::depthwise_grad_weight};

}  // namespace gradnorm_kernels::CPU_CAPABILITY
