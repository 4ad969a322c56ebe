#include "group_norm.h"

#include "per_channel.h"

namespace gradnorm_kernels::CPU_CAPABILITY {
namespace group_norm {
namespace {

// With v, g and x the grad_grad_input, grad_output and input, a = weight g, b = (x - mean) rstd, p and q the
// grad_grad_weight and grad_grad_bias, and <> the mean over a group:
//   grad_grad_output = weight rstd (v - <v> - b <v b>) + p b + q
//   grad_input = rstd (p - weight rstd <v b>) g - rstd^2 <a b> v
//                + (rstd^2 (3 <a b> <v b> + <a> <v> - <v a>) - rstd <p g b>) b
//                + rstd^2 (<v b> <a> + <a b> <v>) - rstd <p g>
//   grad_weight = sum over n and HxW of g rstd (v - <v> - b <v b>)
// So the sums below over the HxW elements of every (n, c) are all that a first look at the tensors gives,
enum Sum { kG, kV, kVG, kGX, kVX, kSums };  // the last two of x - mean
// and the elementwise rest is, for every (n, c), a sum of v, g, x - mean and 1 with these weights.
enum Coefficient { kMean, kOutV, kOutXInG, kOut1, kInV, kInX, kIn1, kCoefficients };

template <class T>
class DoubleBackward {
  using Scalar = at::opmath_type<T>;

 public:
  explicit DoubleBackward(const GroupNormDoubleBackward& args)
      : args_(args),
        // The two layouts are one where a channel has one element, and vectors run along the channels then.
        channels_last_(args.channels_last || args.inner == 1),
        v_(args.grad_grad_input.const_data_ptr<T>()),
        g_(args.grad_output.const_data_ptr<T>()),
        x_(args.input.const_data_ptr<T>()),
        mean_(args.mean.const_data_ptr<Scalar>()),
        rstd_(args.rstd.const_data_ptr<Scalar>()),
        weight_(const_data<Scalar>(args.weight)),
        grad_grad_weight_(const_data<Scalar>(args.grad_grad_weight)),
        grad_grad_bias_(const_data<Scalar>(args.grad_grad_bias)),
        grad_grad_output_(mutable_data<T>(args.grad_grad_output)),
        grad_input_(mutable_data<T>(args.grad_input)),
        stride_(args.channels + 16) {
    units_ = channels_last_ ? args.batch : args.batch * args.num_groups;
    pieces_ = channels_last_ ? (args.inner + kRows - 1) / kRows : args.channels / args.num_groups;
    sums_ = (channels_last_ ? pieces_ : 1) * kSums * stride_;
    scratch_ = sums_ + kCoefficients * stride_;
    if (args.grad_weight.defined()) {
      grad_weights_ = at::empty({args.batch, args.channels}, args.mean.options());
      grad_weight_parts_ = grad_weights_.mutable_data_ptr<Scalar>();
    }
  }

  void run() const {
    if (units_ >= at::get_num_threads()) {
      gradnorm_kernels::parallel_for(0, units_, grain(units_), [&](int64_t begin, int64_t end) {
        const at::Tensor memory = at::empty({scratch_}, args_.mean.options());
        Scalar* const scratch = memory.mutable_data_ptr<Scalar>();
        // The second look at a unit finds it in the cache, if it fits there.
        for (int64_t unit = begin; unit < end; ++unit) {
          start(unit, scratch);
          for (int64_t piece = 0; piece < pieces_; ++piece) {
            sum(unit, piece, scratch);
          }
          finish(unit, scratch);
          for (int64_t piece = 0; piece < pieces_; ++piece) {
            apply(unit, piece, scratch);
          }
        }
      });
    } else {
      const at::Tensor memory = at::empty({args_.batch, scratch_}, args_.mean.options());
      const auto scratch = [&, data = memory.mutable_data_ptr<Scalar>()](int64_t unit) {
        return data + (channels_last_ ? unit : unit / args_.num_groups) * scratch_;
      };
      const auto for_each_unit = [&](const auto& visit) {
        parallel_for(units_, [&](int64_t unit) { visit(unit, scratch(unit)); });
      };
      const auto for_each_piece = [&](const auto& visit) {
        parallel_for(
            units_ * pieces_, [&](int64_t i) { visit(i / pieces_, i % pieces_, scratch(i / pieces_)); });
      };
      for_each_unit([&](auto... task) { start(task...); });
      for_each_piece([&](auto... task) { sum(task...); });
      for_each_unit([&](auto... task) { finish(task...); });
      for_each_piece([&](auto... task) { apply(task...); });
    }
    if (args_.grad_weight.defined()) {
      sum_over_batch();
    }
  }

 private:
  // A unit is what one thread can do alone, all or one of a batch entry's groups, and a piece of it what is
  // added up by itself: some rows, or a channel. Threads do not change the order of any sum.
  static constexpr int64_t kRows = 64;
  static constexpr int64_t kBlock = 512;   // of a channel's elements, which then join a total in double
  static constexpr int64_t kGrain = 8192;  // elements that are worth a thread

  static double value(const Scalar* data, int64_t i, double otherwise) {
    return data ? data[i] : otherwise;
  }

  // The least number of tasks for a thread.
  int64_t grain(int64_t tasks) const {
    return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, args_.input.numel() / tasks));
  }
  template <class Visit>
  void parallel_for(int64_t tasks, const Visit& visit) const {
    gradnorm_kernels::parallel_for(0, tasks, grain(tasks), [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        visit(task);
      }
    });
  }

  // The scratch memory of a batch entry is arrays along its channels: the sums, of each piece where these are
  // rows, and then the coefficients.
  Scalar* sums(Scalar* scratch, int64_t piece) const {
    return scratch + piece * kSums * stride_;
  }
  Scalar* coefficients(Scalar* scratch, Coefficient coefficient) const {
    return scratch + sums_ + coefficient * stride_;
  }

  // Calls visit(n, group) for the groups of a unit.
  template <class Visit>
  void for_each_group(int64_t unit, const Visit& visit) const {
    if (!channels_last_) {
      return visit(unit / args_.num_groups, unit % args_.num_groups);
    }
    for (int64_t group = 0; group < args_.num_groups; ++group) {
      visit(unit, group);
    }
  }

  void start(int64_t unit, Scalar* scratch) const {
    for_each_group(unit, [&](int64_t n, int64_t group) {
      const int64_t size = args_.channels / args_.num_groups;
      const Scalar mean = mean_[n * args_.num_groups + group];
      std::fill_n(coefficients(scratch, kMean) + group * size, size, mean);
    });
  }

  // Calls fn for the elements of a piece, with the first coefficients and with sums from 0.
  template <size_t Inputs, size_t Outputs, size_t Coefficients, size_t Sums, class Fn>
  void visit(
      const ChannelLoop<T, Inputs, Outputs, Coefficients, Sums>& loop, int64_t unit, int64_t piece,
      Scalar* scratch, const Fn& fn) const {
    const Scalar* const from = coefficients(scratch, kMean);
    if (channels_last_) {
      Scalar* const to = sums(scratch, piece);
      std::fill_n(to, Sums * stride_, Scalar(0));
      const int64_t row = piece * kRows, rows = std::min(kRows, args_.inner - row);
      loop.across((unit * args_.inner + row) * args_.channels, rows, args_.channels, from, to, stride_, fn);
      return;
    }
    const int64_t n_channel = unit * pieces_ + piece, channel = n_channel % args_.channels;
    std::array<double, Sums> totals{};
    loop.along(n_channel * args_.inner, args_.inner, kBlock, from + channel, stride_, totals.data(), 1, fn);
    for (size_t k = 0; k < Sums; ++k) {
      sums(scratch, 0)[k * stride_ + channel] = static_cast<Scalar>(totals[k]);
    }
  }

  void sum(int64_t unit, int64_t piece, Scalar* scratch) const {
    const ChannelLoop<T, 3, 0, 1, kSums> loop{{v_, g_, x_}, {}};
    visit(loop, unit, piece, scratch, [](const auto& in, const auto& coefficients, auto&, auto& sums) {
      const auto& [v, g, x] = in;
      const auto centred = x - coefficients[kMean];
      sums[kG] = sums[kG] + g;
      sums[kV] = sums[kV] + v;
      sums[kVG] = at::vec::fmadd(v, g, sums[kVG]);
      sums[kGX] = at::vec::fmadd(g, centred, sums[kGX]);
      sums[kVX] = at::vec::fmadd(v, centred, sums[kVX]);
    });
  }

  void finish(int64_t unit, Scalar* scratch) const {
    for_each_group(unit, [&](int64_t n, int64_t group) { finish_group(n, group, scratch); });
  }

  void finish_group(int64_t n, int64_t group, Scalar* scratch) const {
    const int64_t channels = args_.channels, size = channels / args_.num_groups;
    const int64_t begin = group * size, end = begin + size;
    const double rstd = rstd_[n * args_.num_groups + group];
    const double per_element = 1.0 / (static_cast<double>(size) * static_cast<double>(args_.inner));
    Scalar* const totals = sums(scratch, 0);
    const auto total = [&](Sum sum, int64_t c) -> double { return totals[sum * stride_ + c]; };
    double a = 0, ab = 0, va = 0, v = 0, vb = 0, pg = 0, pgb = 0;
    for (int64_t c = begin; c < end; ++c) {
      if (channels_last_ && pieces_ > 1) {
        for (int s = 0; s < kSums; ++s) {
          double sum = 0;
          for (int64_t piece = 0; piece < pieces_; ++piece) {
            sum += sums(scratch, piece)[s * stride_ + c];
          }
          totals[s * stride_ + c] = static_cast<Scalar>(sum);
        }
      }
      const double weight = value(weight_, c, 1), p = value(grad_grad_weight_, c, 0);
      a += weight * total(kG, c);
      ab += weight * total(kGX, c);
      va += weight * total(kVG, c);
      v += total(kV, c);
      vb += total(kVX, c);
      pg += p * total(kG, c);
      pgb += p * total(kGX, c);
    }
    for (double* sum : {&a, &va, &v, &pg}) {
      *sum *= per_element;
    }
    for (double* sum : {&ab, &vb, &pgb}) {
      *sum *= per_element * rstd;
    }
    Scalar* const results = coefficients(scratch, kMean);
    const auto set = [&](Coefficient coefficient, int64_t c, double value) {
      results[coefficient * stride_ + c] = static_cast<Scalar>(value);
    };
    for (int64_t c = begin; c < end; ++c) {
      const double weight = value(weight_, c, 1) * rstd;
      set(kOutV, c, weight);
      set(kOutXInG, c, rstd * (value(grad_grad_weight_, c, 0) - weight * vb));
      set(kOut1, c, value(grad_grad_bias_, c, 0) - weight * v);
      set(kInV, c, -rstd * rstd * ab);
      set(kInX, c, rstd * rstd * (rstd * (3 * ab * vb + a * v - va) - pgb));
      set(kIn1, c, rstd * (rstd * (vb * a + ab * v) - pg));
      if (grad_weight_parts_) {
        grad_weight_parts_[n * channels + c] =
            static_cast<Scalar>(rstd * (total(kVG, c) - v * total(kG, c) - rstd * vb * total(kGX, c)));
      }
    }
  }

  void apply(int64_t unit, int64_t piece, Scalar* scratch) const {
    if (grad_grad_output_ && grad_input_) {
      apply<true, true>(unit, piece, scratch);
    } else if (grad_grad_output_) {
      apply<true, false>(unit, piece, scratch);
    } else if (grad_input_) {
      apply<false, true>(unit, piece, scratch);
    }
  }

  template <bool Out, bool In>
  void apply(int64_t unit, int64_t piece, Scalar* scratch) const {
    ChannelLoop<T, 3, Out + In, kCoefficients, 0> loop{{v_, g_, x_}, {}};
    if constexpr (Out) {
      loop.outputs[0] = grad_grad_output_;
    }
    if constexpr (In) {
      loop.outputs[Out] = grad_input_;
    }
    visit(loop, unit, piece, scratch, [](const auto& in, const auto& coefficients, auto& out, auto&) {
      using at::vec::fmadd;
      const auto& [v, g, x] = in;
      const auto centred = x - coefficients[kMean];
      if constexpr (Out) {
        const auto rest = fmadd(centred, coefficients[kOutXInG], coefficients[kOut1]);
        out[0] = fmadd(v, coefficients[kOutV], rest);
      }
      if constexpr (In) {
        const auto rest = fmadd(centred, coefficients[kInX], coefficients[kIn1]);
        out[Out] = fmadd(g, coefficients[kOutXInG], fmadd(v, coefficients[kInV], rest));
      }
    });
  }

  void sum_over_batch() const {
    Scalar* const grad_weight = args_.grad_weight.mutable_data_ptr<Scalar>();
    std::vector<double> totals(args_.channels);
    for (int64_t i = 0; i < args_.batch * args_.channels; i += args_.channels) {
      for (int64_t c = 0; c < args_.channels; ++c) {
        totals[c] += grad_weight_parts_[i + c];
      }
    }
    std::copy(totals.begin(), totals.end(), grad_weight);
  }

  const GroupNormDoubleBackward& args_;
  const bool channels_last_;
  const T *const v_, *const g_, *const x_;
  const Scalar *const mean_, *const rstd_, *const weight_, *const grad_grad_weight_, *const grad_grad_bias_;
  T *const grad_grad_output_, *const grad_input_;
  // Between the arrays in scratch memory: a power of two would have them share sets of the cache.
  const int64_t stride_;
  int64_t units_, pieces_, sums_, scratch_;
  at::Tensor grad_weights_;  // of every batch entry
  Scalar* grad_weight_parts_ = nullptr;
};

void double_backward(const GroupNormDoubleBackward& args) {
  dispatch(args.input.scalar_type(), [&](auto type) { DoubleBackward<decltype(type)>(args).run(); });
}

}  // namespace
}  // namespace group_norm

const GroupNormKernels group_norm_kernels{group_norm::double_backward};

}  // namespace gradnorm_kernels::CPU_CAPABILITY
