#include "batch_norm.h"

#include "per_channel.h"

namespace gradnorm_kernels::CPU_CAPABILITY {
namespace batch_norm {
namespace {

template <class T>
void scale_impl(
    const ChannelLayout& layout, const T* input, const T* factor, const double* scale, const double* shift,
    T* output, double* sum, double* product_sum) {
  for_channel_blocks(layout, [&](int64_t begin, int64_t end) {
    if (sum == nullptr) {
      ChannelPass<T, 1, 1, 1, 0> pass(layout, begin, end);
      for (int64_t c = begin; c < end; ++c) {
        pass.set(c - begin, {scale[c]});
      }
      pass.run({input}, {output}, [](const auto& in, const auto& coefficients, auto& out, auto&) {
        out[0] = in[0] * coefficients[0];
      });
      return;
    }
    ChannelPass<T, 2, 1, 2, 2> pass(layout, begin, end);
    for (int64_t c = begin; c < end; ++c) {
      pass.set(c - begin, {scale[c], shift[c]});
    }
    pass.run({input, factor}, {output}, [](const auto& in, const auto& coefficients, auto& out, auto& sums) {
      out[0] = in[0] * coefficients[0];
      sums[0] = sums[0] + in[0];
      sums[1] = at::vec::fmadd(in[0], in[1] - coefficients[1], sums[1]);
    });
    for (int64_t c = begin; c < end; ++c) {
      sum[c] = pass.sum(c - begin, 0);
      product_sum[c] = pass.sum(c - begin, 1);
    }
  });
}

void scale(
    c10::ScalarType dtype, const ChannelLayout& layout, const void* input, const void* factor,
    const double* scale, const double* shift, void* output, double* sum, double* product_sum) {
  dispatch(dtype, [&](auto type) {
    using T = decltype(type);
    scale_impl(
        layout, static_cast<const T*>(input), static_cast<const T*>(factor), scale, shift,
        static_cast<T*>(output), sum, product_sum);
  });
}

// With v = grad_grad_input, g = grad_output, u = grad_grad_weight, d = x - mean, r = invstd, h = d r, and
// <> the mean over a channel:
//   grad_grad_output = w r (v - <v> - h <v h>) + u h + grad_grad_bias
//   grad_weight      = M r (<v g> - <v> <g> - <v h> <g h>)
//   grad_input       = (u r - w r^2 <v h>) (g - <g> - h <g h>)
//                      - w r^2 (<g h> (v - <v> - h <v h>) + h (<v g> - <v> <g> - <v h> <g h>))
// The sums of a first pass make each of them a linear function of v, g and d in the second.
template <class T>
void train_impl(
    const ChannelLayout& layout, const ChannelParameters& parameters, const T* v, const T* g, const T* x,
    T* grad_grad_output, T* grad_input, double* grad_weight) {
  const auto count = static_cast<double>(layout.outer * layout.inner);
  for_channel_blocks(layout, [&](int64_t begin, int64_t end) {
    ChannelPass<T, 3, 0, 1, 5> reduce(layout, begin, end);
    for (int64_t c = begin; c < end; ++c) {
      reduce.set(c - begin, {parameters.mean[c]});
    }
    reduce.run({v, g, x}, {}, [](const auto& in, const auto& coefficients, auto&, auto& sum) {
      const auto& [v, g, x] = in;
      const auto d = x - coefficients[0];
      sum[0] = sum[0] + v;
      sum[1] = sum[1] + g;
      sum[2] = at::vec::fmadd(v, d, sum[2]);
      sum[3] = at::vec::fmadd(g, d, sum[3]);
      sum[4] = at::vec::fmadd(v, g, sum[4]);
    });

    ChannelPass<T, 3, 2, 8, 0> apply(layout, begin, end);
    for (int64_t c = begin; c < end; ++c) {
      const double r = parameters.invstd[c], wr = parameters.weight[c] * r,
                   ur = parameters.grad_grad_weight[c] * r;
      const auto mean = [&](size_t k) { return reduce.sum(c - begin, k) / count; };
      const double mean_v = mean(0), mean_g = mean(1), mean_vh = mean(2) * r, mean_gh = mean(3) * r;
      const double covariance = mean(4) - mean_v * mean_g - mean_vh * mean_gh;
      grad_weight[c] = count * r * covariance;
      const double of_v = -wr * r * mean_gh, of_g = ur - wr * r * mean_vh;
      apply.set(
          c - begin, {parameters.mean[c],
                      // of v, d and 1 in grad_grad_output
                      wr, ur - wr * r * mean_vh, parameters.grad_grad_bias[c] - wr * mean_v,
                      // of v, g, d and 1 in grad_input
                      of_v, of_g, -r * (of_v * mean_vh + of_g * mean_gh + wr * r * covariance),
                      -of_v * mean_v - of_g * mean_g});
    }
    apply.run(
        {v, g, x}, {grad_grad_output, grad_input},
        [](const auto& in, const auto& coefficients, auto& out, auto&) {
          using at::vec::fmadd;
          const auto& [v, g, x] = in;
          const auto d = x - coefficients[0];
          out[0] = fmadd(v, coefficients[1], fmadd(d, coefficients[2], coefficients[3]));
          out[1] = fmadd(
              v, coefficients[4], fmadd(g, coefficients[5], fmadd(d, coefficients[6], coefficients[7])));
        });
  });
}

// As above, mean and r being constants:
//   grad_grad_output = w r v + u h + grad_grad_bias,  grad_weight = r sum(v g),  grad_input = u r g
template <class T>
void eval_impl(
    const ChannelLayout& layout, const ChannelParameters& parameters, const T* v, const T* g, const T* x,
    T* grad_grad_output, T* grad_input, double* grad_weight) {
  for_channel_blocks(layout, [&](int64_t begin, int64_t end) {
    ChannelPass<T, 3, 2, 4, 1> pass(layout, begin, end);
    for (int64_t c = begin; c < end; ++c) {
      const double r = parameters.invstd[c];
      pass.set(
          c - begin, {parameters.mean[c], parameters.weight[c] * r, parameters.grad_grad_weight[c] * r,
                      parameters.grad_grad_bias[c]});
    }
    pass.run(
        {v, g, x}, {grad_grad_output, grad_input},
        [](const auto& in, const auto& coefficients, auto& out, auto& sum) {
          using at::vec::fmadd;
          const auto& [v, g, x] = in;
          out[0] = fmadd(v, coefficients[1], fmadd(x - coefficients[0], coefficients[2], coefficients[3]));
          out[1] = g * coefficients[2];
          sum[0] = fmadd(v, g, sum[0]);
        });
    for (int64_t c = begin; c < end; ++c) {
      grad_weight[c] = pass.sum(c - begin, 0) * parameters.invstd[c];
    }
  });
}

void double_backward(
    c10::ScalarType dtype, const ChannelLayout& layout, const ChannelParameters& parameters, bool training,
    const void* grad_grad_input, const void* grad_output, const void* input, void* grad_grad_output,
    void* grad_input, double* grad_weight) {
  dispatch(dtype, [&](auto type) {
    using T = decltype(type);
    (training ? train_impl<T> : eval_impl<T>)(layout, parameters, static_cast<const T*>(grad_grad_input),
                                              static_cast<const T*>(grad_output),
                                              static_cast<const T*>(input), static_cast<T*>(grad_grad_output),
                                              static_cast<T*>(grad_input), grad_weight);
  });
}

}  // namespace
}  // namespace batch_norm

const BatchNormKernels batch_norm_kernels{batch_norm::scale, batch_norm::double_backward};

}  // namespace gradnorm_kernels::CPU_CAPABILITY
