#include "batch_norm_act.h"

#include "per_channel.h"

namespace gradnorm_kernels::CPU_CAPABILITY {
namespace batch_norm_act {
namespace {

// With g = grad_output, d = x - mean, r = invstd, h = d r, the activation's input z = w h + b, a = g f'(z),
// and
// <> the mean over a channel:
//   grad_input = w r (a - <a> - h <a h>),  grad_weight = M <a h>,  grad_bias = M <a>
// and where mean and r are constants, grad_input = w r a.
template <class T, class Act>
void backward_impl(
    const ChannelLayout& layout, const ChannelParameters& parameters, const double* bias, bool training,
    const Act& act, const T* g, const T* x, T* grad_input, double* grad_weight, double* grad_bias) {
  const auto count = static_cast<double>(layout.outer * layout.inner);
  // coefficients: the mean, the factor of d in z, and the bias.
  const auto grad_z = [act](const auto& g, const auto& d, const auto& coefficients) {
    return act.df(g, at::vec::fmadd(d, coefficients[1], coefficients[2]));
  };
  const auto add = [](const auto& a, const auto& d, auto& sum) {
    sum[0] = sum[0] + a;
    sum[1] = at::vec::fmadd(a, d, sum[1]);
  };
  for_channel_blocks(layout, [&](int64_t begin, int64_t end) {
    const auto set_sums = [&](const auto& pass) {
      for (int64_t c = begin; c < end; ++c) {
        grad_bias[c] = pass.sum(c - begin, 0);
        grad_weight[c] = pass.sum(c - begin, 1) * parameters.invstd[c];
      }
    };
    const auto scale = [&](int64_t c) { return parameters.weight[c] * parameters.invstd[c]; };
    if (!training) {
      ChannelPass<T, 2, 1, 3, 2> pass(layout, begin, end);
      for (int64_t c = begin; c < end; ++c) {
        pass.set(c - begin, {parameters.mean[c], scale(c), bias[c]});
      }
      pass.run({g, x}, {grad_input}, [&](const auto& in, const auto& coefficients, auto& out, auto& sum) {
        const auto d = in[1] - coefficients[0];
        const auto a = grad_z(in[0], d, coefficients);
        add(a, d, sum);
        out[0] = a * coefficients[1];
      });
      set_sums(pass);
      return;
    }
    ChannelPass<T, 2, 0, 3, 2> reduce(layout, begin, end);
    for (int64_t c = begin; c < end; ++c) {
      reduce.set(c - begin, {parameters.mean[c], scale(c), bias[c]});
    }
    reduce.run({g, x}, {}, [&](const auto& in, const auto& coefficients, auto&, auto& sum) {
      const auto d = in[1] - coefficients[0];
      add(grad_z(in[0], d, coefficients), d, sum);
    });
    set_sums(reduce);
    ChannelPass<T, 2, 1, 5, 0> apply(layout, begin, end);
    for (int64_t c = begin; c < end; ++c) {
      const double r = parameters.invstd[c], wr = scale(c);
      apply.set(
          c - begin, {parameters.mean[c], wr, bias[c],
                      // of d and 1
                      -wr * r * grad_weight[c] / count, -wr * grad_bias[c] / count});
    }
    apply.run({g, x}, {grad_input}, [&](const auto& in, const auto& coefficients, auto& out, auto&) {
      using at::vec::fmadd;
      const auto d = in[1] - coefficients[0];
      const auto a = grad_z(in[0], d, coefficients);
      out[0] = fmadd(a, coefficients[1], fmadd(d, coefficients[3], coefficients[4]));
    });
  });
}

// As above, with v = grad_grad_input, P t = t - <t> - h <t h>, and k = g f''(z):
//   q                = w r P v, the gradient of a
//   grad_grad_output = q f'(z)
//   c                = q k, the gradient of z by way of f'
//   grad_bias        = M <c>
//   grad_weight      = M <c h> + M r (<v a> - <v> <a> - <v h> <a h>)
//   grad_input       = w r P c - w r^2 (<a h> P v + <v h> P a + h (<v a> - <v> <a> - <v h> <a h>))
// Where mean and r are constants P is the identity, and the second terms are M r <v a> and 0. What the sums
// of a first pass say makes all but f' and f'' linear functions of v, a, c and d in the second.
template <class T, class Act>
void double_backward_impl(
    const ChannelLayout& layout, const ChannelParameters& parameters, const double* bias, bool training,
    const Act& act, const T* v, const T* g, const T* x, T* grad_grad_output, T* grad_input,
    double* grad_weight, double* grad_bias) {
  const auto count = static_cast<double>(layout.outer * layout.inner);
  for_channel_blocks(layout, [&](int64_t begin, int64_t end) {
    if (!training) {
      ChannelPass<T, 3, 2, 3, 3> pass(layout, begin, end);
      for (int64_t c = begin; c < end; ++c) {
        pass.set(c - begin, {parameters.mean[c], parameters.weight[c] * parameters.invstd[c], bias[c]});
      }
      pass.run(
          {v, g, x}, {grad_grad_output, grad_input},
          [act](const auto& in, const auto& coefficients, auto& out, auto& sum) {
            using at::vec::fmadd;
            const auto& [v, g, x] = in;
            const auto d = x - coefficients[0], z = fmadd(d, coefficients[1], coefficients[2]);
            const auto q = v * coefficients[1];
            out[0] = act.df(q, z);
            sum[0] = fmadd(v, act.df(g, z), sum[0]);
            if constexpr (has_d2f<Act>) {
              const auto c = act.d2f(q, g, z);
              out[1] = c * coefficients[1];
              sum[1] = sum[1] + c;
              sum[2] = fmadd(c, d, sum[2]);
            }
          });
      for (int64_t c = begin; c < end; ++c) {
        grad_bias[c] = pass.sum(c - begin, 1);
        grad_weight[c] = (pass.sum(c - begin, 0) + pass.sum(c - begin, 2)) * parameters.invstd[c];
      }
      return;
    }
    constexpr size_t sums = has_d2f<Act> ? 10 : 5;
    ChannelPass<T, 3, 0, 3, sums> reduce(layout, begin, end);
    for (int64_t c = begin; c < end; ++c) {
      reduce.set(c - begin, {parameters.mean[c], parameters.weight[c] * parameters.invstd[c], bias[c]});
    }
    reduce.run({v, g, x}, {}, [act](const auto& in, const auto& coefficients, auto&, auto& sum) {
      using at::vec::fmadd;
      const auto& [v, g, x] = in;
      const auto d = x - coefficients[0], z = fmadd(d, coefficients[1], coefficients[2]);
      const auto a = act.df(g, z);
      sum[0] = sum[0] + v;
      sum[1] = fmadd(v, d, sum[1]);
      sum[2] = sum[2] + a;
      sum[3] = fmadd(a, d, sum[3]);
      sum[4] = fmadd(v, a, sum[4]);
      if constexpr (has_d2f<Act>) {
        const auto k = act.d2f(operand<std::decay_t<decltype(g)>>(1.0_c), g, z), kd = k * d;
        sum[5] = sum[5] + k;
        sum[6] = sum[6] + kd;
        sum[7] = fmadd(kd, d, sum[7]);
        sum[8] = fmadd(v, k, sum[8]);
        sum[9] = fmadd(v, kd, sum[9]);
      }
    });

    ChannelPass<T, 3, 2, 9, 0> apply(layout, begin, end);
    for (int64_t c = begin; c < end; ++c) {
      const double r = parameters.invstd[c], wr = parameters.weight[c] * r;
      const auto mean = [&](size_t k) { return k < sums ? reduce.sum(c - begin, k) / count : 0; };
      const double mean_v = mean(0), mean_vh = mean(1) * r, mean_a = mean(2), mean_ah = mean(3) * r;
      const double covariance = mean(4) - mean_v * mean_a - mean_vh * mean_ah;
      // q as a function of v, d and 1.
      const double q_of_d = -wr * r * mean_vh, q_of_1 = -wr * mean_v;
      const double mean_c = wr * mean(8) + q_of_d * mean(6) + q_of_1 * mean(5);
      const double mean_ch = r * (wr * mean(9) + q_of_d * mean(7) + q_of_1 * mean(6));
      grad_bias[c] = count * mean_c;
      grad_weight[c] = count * (mean_ch + r * covariance);
      const double of_v = -wr * r * mean_ah, of_a = -wr * r * mean_vh;
      apply.set(
          c - begin, {parameters.mean[c], wr, bias[c], q_of_d, q_of_1,
                      // of v, a, d and 1 in grad_input
                      of_v, of_a, -r * (of_v * mean_vh + of_a * mean_ah + wr * r * covariance + wr * mean_ch),
                      -of_v * mean_v - of_a * mean_a - wr * mean_c});
    }
    apply.run(
        {v, g, x}, {grad_grad_output, grad_input},
        [act](const auto& in, const auto& coefficients, auto& out, auto&) {
          using at::vec::fmadd;
          const auto& [v, g, x] = in;
          const auto& [mean, wr, bias, q_of_d, q_of_1, of_v, of_a, of_d, of_1] = coefficients;
          const auto d = x - mean, z = fmadd(d, wr, bias), q = fmadd(v, wr, fmadd(d, q_of_d, q_of_1));
          out[0] = act.df(q, z);
          out[1] = fmadd(v, of_v, fmadd(act.df(g, z), of_a, fmadd(d, of_d, of_1)));
          if constexpr (has_d2f<Act>) {
            out[1] = fmadd(act.d2f(q, g, z), wr, out[1]);
          }
        });
  });
}

// fn(T(), activation)
template <class Fn>
void for_types(c10::ScalarType dtype, const ActOfBatchNorm& any, const Fn& fn) {
  std::visit(
      [&](const auto& act) {
        dtype == at::kDouble     ? fn(double(), act)
        : dtype == at::kBFloat16 ? fn(at::BFloat16(), act)
                                 : fn(float(), act);
      },
      any);
}

void backward(
    c10::ScalarType dtype, const ChannelLayout& layout, const ChannelParameters& parameters,
    const double* bias, bool training, const ActOfBatchNorm& any, const void* grad_output, const void* input,
    void* grad_input, double* grad_weight, double* grad_bias) {
  for_types(dtype, any, [&](auto type, const auto& act) {
    using T = decltype(type);
    backward_impl<T>(
        layout, parameters, bias, training, act, static_cast<const T*>(grad_output),
        static_cast<const T*>(input), static_cast<T*>(grad_input), grad_weight, grad_bias);
  });
}

void double_backward(
    c10::ScalarType dtype, const ChannelLayout& layout, const ChannelParameters& parameters,
    const double* bias, bool training, const ActOfBatchNorm& any, const void* grad_grad_input,
    const void* grad_output, const void* input, void* grad_grad_output, void* grad_input, double* grad_weight,
    double* grad_bias) {
  for_types(dtype, any, [&](auto type, const auto& act) {
    using T = decltype(type);
    double_backward_impl<T>(
        layout, parameters, bias, training, act, static_cast<const T*>(grad_grad_input),
        static_cast<const T*>(grad_output), static_cast<const T*>(input), static_cast<T*>(grad_grad_output),
        static_cast<T*>(grad_input), grad_weight, grad_bias);
  });
}

}  // namespace
}  // namespace batch_norm_act

const BatchNormActKernels batch_norm_act_kernels{batch_norm_act::backward, batch_norm_act::double_backward};

}  // namespace gradnorm_kernels::CPU_CAPABILITY
