// Grid sampling in two and three dimensions, bilinear and nearest. Forward and first backward are ATen's
// kernels; the double backward is ours.
//
// A point of the grid lies in a cell, whose corners k are pixels x_k or, outside of the input, 0. With t_d
// how far it is from the lower corner along dimension d, its sample is sum_k w_k x_k, where w_k is a product
// of t_d at upper corners and 1 - t_d at lower ones. The derivative m_d of t_d by the grid is constant in a
// cell. With g the sample's gradient, those of x_k and the grid are g w_k and m_d sum_k g x_k dw_k/dt_d. With
// v and u the gradients of these two and a_k = sum_d m_d u_d dw_k/dt_d, that of g is sum_k v_k w_k + x_k a_k,
// that of x_k is g a_k, and that of the grid m_d sum_k g (v_k dw_k/dt_d + x_k da_k/dt_d). Of the nearest
// pixel, w is 1.
#include "cpu/grid_sample.h"

#include <ATen/autocast_mode.h>
#include <ATen/native/GridSamplerUtils.h>

#include "op.h"

namespace gradnorm_kernels::grid_sample {
namespace {

using at::native::GridSamplerPadding;
constexpr auto kNearest = static_cast<int64_t>(at::native::GridSamplerInterpolation::Nearest);

// What every op here is of, as ATen's ops have it.
struct Sampling {
  const char* op;
  const Tensor &input, &grid;
  int64_t interpolation_mode, padding_mode;
  bool align_corners;

  int64_t dims() const {
    return input.dim() - 2;
  }
  bool is_nearest() const {
    return interpolation_mode == kNearest;
  }
  bool has_padding(GridSamplerPadding padding) const {
    return padding_mode == static_cast<int64_t>(padding);
  }
  c10::SymDimVector output_sizes() const {
    c10::SymDimVector sizes(grid.sym_sizes().slice(0, grid.dim() - 1));
    sizes.insert(sizes.begin() + 1, input.sym_size(1));
    return sizes;
  }
  bool is_covered() const {
    if (input.is_nested() || grid.is_nested() || !is_elementwise_match(input, input) ||
        !is_elementwise_match(grid, grid) || input.scalar_type() != grid.scalar_type() ||
        input.device() != grid.device()) {
      return false;
    }
    const auto pixels = input.sym_sizes().slice(std::min<int64_t>(2, input.dim()));
    return (interpolation_mode == 0 || interpolation_mode == 1) && 0 <= padding_mode && padding_mode <= 2 &&
           (dims() == 2 || dims() == 3) && grid.dim() == input.dim() &&
           grid.sym_size(0) == input.sym_size(0) && grid.sym_size(-1) == dims() &&
           std::all_of(pixels.begin(), pixels.end(), [](const auto& size) { return size > 0; });
  }
  void check() const {
    check_floating(op, {{"input", input}, {"grid", grid}});
    TORCH_CHECK_VALUE(
        is_covered(), op, ": expected input of shape (N, C, ...) with 2 or 3 dimensions that are not empty, ",
        "grid of shape (N, ..., 2) or (N, ..., 3) with as many, interpolation_mode 0 or 1 and padding_mode ",
        "0, 1 or 2, got ", input.sym_sizes(), ", ", grid.sym_sizes(), ", ", interpolation_mode, " and ",
        padding_mode);
  }
  void check(const Tensor& grad_output) const {
    check();
    check_floating(op, {{"input", input}, {"grad_output", grad_output}});
    TORCH_CHECK_VALUE(
        grad_output.sym_sizes() == output_sizes(), op, ": expected grad_output of shape (", output_sizes(),
        "), got ", grad_output.sym_sizes());
  }

  // By ATen's kernels, of a tensor of input's shape.
  Tensor forward(const Tensor& tensor) const {
    return (dims() == 2 ? at::grid_sampler_2d : at::grid_sampler_3d)(
        tensor, grid, interpolation_mode, padding_mode, align_corners);
  }
  TensorPair backward(const Tensor& grad_output, const Tensor& tensor, const Mask<2>& output_mask) const {
    return (dims() == 2 ? at::grid_sampler_2d_backward : at::grid_sampler_3d_backward)(
        grad_output, tensor, grid, interpolation_mode, padding_mode, align_corners, output_mask);
  }
};

template <class Op>
Sampling sampling(const Op& op) {
  return {name_of<Op>(), op.input, op.grid, op.interpolation_mode, op.padding_mode, op.align_corners};
}

// By plain ops, with the points one dimension: (N, C, points) and, of what has no channels, (N, points).
// Corner k is the upper one of dimension d if bit d of k is set; coordinates name the last dimension first.
class Cells {
 public:
  explicit Cells(const Sampling& of) : of_(of) {
    const Tensor coordinates = flat(of.grid);
    for (int64_t d = 0; d < of.dims(); ++d) {
      locate(coordinates.select(-1, d), of.input.sym_size(-1 - d));
    }
  }

  // A corner's weight, differentiated by the dimensions whose bits are set,
  auto weight() const {
    return [this](int64_t corner, int64_t differentiated) {
      Tensor product = at::ones_like(upper_share_[0]);
      for (int64_t d = 0; d < of_.dims(); ++d) {
        const bool upper = corner >> d & 1;
        if (differentiated >> d & 1) {
          product = upper ? product : -product;
        } else {
          product = product * (upper ? upper_share_[d] : 1 - upper_share_[d]);
        }
      }
      return product;
    };
  }
  // and its derivative where the grid moves by u, differentiated further.
  auto change(const Tensor& u) const {
    return [this, u = flat(u)](int64_t corner, int64_t differentiated) {
      Tensor sum = at::zeros_like(upper_share_[0]);
      for (int64_t d = 0; d < of_.dims(); ++d) {
        if (!(differentiated >> d & 1)) {
          sum = sum + slope_[d] * u.select(-1, d) * weight()(corner, differentiated | 1 << d);
        }
      }
      return sum;
    };
  }

  // With these weights: the samples of a tensor of input's shape; what samples with the gradient g add to its
  // gradient; and that of the grid.
  template <class Weight>
  Tensor samples(const Tensor& tensor, const Weight& weight) const {
    Tensor sum;
    for (int64_t k = 0; k < corners(); ++k) {
      const Tensor term = gather(tensor, k) * weight(k, 0).unsqueeze(1);
      sum = sum.defined() ? sum + term : term;
    }
    return sum.reshape_symint(of_.output_sizes());
  }
  template <class Weight>
  Tensor grad_input(const Tensor& g, const Weight& weight) const {
    const Tensor values = to_opmath(g).flatten(2);
    const auto sizes = of_.input.sym_sizes();
    Tensor sum = at::zeros_symint(sizes, values.options()).flatten(2);
    for (int64_t k = 0; k < corners(); ++k) {
      const auto [pixel, is_outside] = pixels(k);
      sum = sum.scatter_add(2, pixel, (values * weight(k, 0).unsqueeze(1)).masked_fill(is_outside, 0));
    }
    return sum.reshape_symint(sizes);
  }
  template <class Weight>
  Tensor grad_grid(const Tensor& g, const Tensor& tensor, const Weight& weight) const {
    std::vector<Tensor> sums(of_.dims(), at::zeros_like(slope_[0]));
    for (int64_t k = 0; k < corners() && !of_.is_nearest(); ++k) {
      const Tensor product = (to_opmath(g).flatten(2) * gather(tensor, k)).sum(1);
      for (int64_t d = 0; d < of_.dims(); ++d) {
        sums[d] = sums[d] + slope_[d] * product * weight(k, 1 << d);
      }
    }
    return at::stack(sums, -1).reshape_symint(of_.grid.sym_sizes());
  }

 private:
  Tensor flat(const Tensor& like_grid) const {
    return to_opmath(like_grid).flatten(1, -2);
  }
  int64_t corners() const {
    return of_.is_nearest() ? 1 : 1 << of_.dims();
  }
  void locate(const Tensor& coordinate, const c10::SymInt& size) {
    const auto last = c10::SymFloat(size) - 1, turn = (of_.align_corners ? last : last + 1) * 2;
    const double low = of_.align_corners ? 0 : -0.5;
    Tensor x = (coordinate + 1) * (turn / 4) + low, slope = at::full_like(coordinate, turn / 4);
    if (of_.has_padding(GridSamplerPadding::Reflection)) {
      const Tensor sign = at::where(x < low, -1, 1), far = (x - low) * sign;
      const Tensor rest = far - (far.detach() / turn).trunc() * turn, is_turned = rest > turn / 2;
      x = at::where(is_turned, -rest + turn, rest) + low;
      slope = slope * sign * at::where(is_turned, -1, 1);
    }
    if (!of_.has_padding(GridSamplerPadding::Zeros)) {
      const Tensor is_between = (x > 0).logical_and(x < last);
      x = at::where(is_between, x, (x >= last) * last);
      slope = slope * is_between;
    }
    const Tensor lower = of_.is_nearest() ? x.detach().round() : x.detach().floor();
    const Tensor is_far = (lower >= -1).logical_and(lower < size).logical_not();
    lower_.push_back(lower.masked_fill(is_far, -2).to(at::kLong));
    upper_share_.push_back(of_.is_nearest() ? at::zeros_like(lower) : x - lower);
    slope_.push_back(slope);
  }
  // A corner's places in the flattened input, for every channel, and whether it is outside.
  TensorPair pixels(int64_t corner) const {
    Tensor pixel = at::zeros_like(lower_[0]), is_outside = pixel.to(at::kBool);
    c10::SymInt stride = 1;
    for (int64_t d = 0; d < of_.dims(); ++d) {
      const auto size = of_.input.sym_size(-1 - d);
      const Tensor index = lower_[d] + (corner >> d & 1);
      is_outside = is_outside.logical_or(index < 0).logical_or(index >= size);
      pixel = pixel + index * stride;
      stride = stride * size;
    }
    is_outside = is_outside.unsqueeze(1);
    pixel = pixel.unsqueeze(1).masked_fill(is_outside, 0);
    return {pixel.expand_symint({-1, of_.input.sym_size(1), -1}), is_outside};
  }
  Tensor gather(const Tensor& tensor, int64_t corner) const {
    const auto [pixel, is_outside] = pixels(corner);
    return to_opmath(tensor).flatten(2).gather(2, pixel).masked_fill(is_outside, 0);
  }

  const Sampling& of_;
  std::vector<Tensor> lower_, upper_share_, slope_;  // for each coordinate
};

struct DoubleBackward {
  static constexpr auto schema =
      "grid_sample_double_backward(Tensor? grad_grad_input, Tensor? grad_grad_grid, Tensor grad_output, "
      "Tensor input, Tensor grid, int interpolation_mode, int padding_mode, bool align_corners, "
      "bool[3] output_mask) -> (Tensor grad_grad_output, Tensor grad_input, Tensor grad_grid)";
  OptionalTensor grad_grad_input, grad_grad_grid;
  const Tensor &grad_output, &input, &grid;
  int64_t interpolation_mode, padding_mode;
  bool align_corners;
  Mask<3> output_mask;
  auto tie() const {
    return std::tie(
        grad_grad_input, grad_grad_grid, grad_output, input, grid, interpolation_mode, padding_mode,
        align_corners, output_mask);
  }
  auto differentiable() const {
    return std::tie(grad_grad_input, grad_grad_grid, grad_output, input, grid);
  }

  Sampling checked() const {
    const auto of = sampling(*this);
    of.check(grad_output);
    check_elementwise(of.op, {{"input", input}, {"grad_grad_input", grad_grad_input}});
    check_elementwise(of.op, {{"grid", grid}, {"grad_grad_grid", grad_grad_grid}});
    return of;
  }
  // Without a gradient of grad_grid, or of the nearest pixel, the derivatives are of first order.
  bool is_linear(const Sampling& of) const {
    return !grad_grad_grid.defined() || of.is_nearest();
  }
  TensorTriple zeros(const Sampling& of, const Mask<3>& mask) const {
    return {
        mask[0] ? at::zeros_symint(of.output_sizes(), input.options()) : Tensor(),
        zeros_contiguous(input, mask[1]), zeros_contiguous(grid, mask[2])};
  }
  TensorTriple composite() const {
    const auto of = checked();
    const Cells cells(of);
    auto results = zeros(of, output_mask);
    auto& [grad_grad_output, grad_input, grad_grid] = results;
    const auto add = [&](Tensor& sum, const auto& term) {
      if (sum.defined()) {
        sum = (to_opmath(sum) + term()).to(input.scalar_type());
      }
    };
    const auto add_samples = [&](const Tensor& sampled, const auto& weight) {
      add(grad_grad_output, [&] { return cells.samples(sampled, weight); });
      add(grad_grid, [&] { return cells.grad_grid(grad_output, sampled, weight); });
    };
    if (grad_grad_input.defined()) {
      add_samples(grad_grad_input, cells.weight());
    }
    if (!is_linear(of)) {
      const auto change = cells.change(grad_grad_grid);
      add_samples(input, change);
      add(grad_input, [&] { return cells.grad_input(grad_output, change); });
    }
    return results;
  }
  TensorTriple by_aten(const Sampling& of) const {
    const Tensor& v = grad_grad_input;
    const bool to_output = output_mask[0] && v.defined();
    const bool to_grid = output_mask[2] && v.defined() && !of.is_nearest();
    auto results = zeros(of, {output_mask[0] && !to_output, output_mask[1], output_mask[2] && !to_grid});
    if (to_output) {
      std::get<0>(results) = of.forward(v);
    }
    if (to_grid) {
      std::get<2>(results) = std::get<1>(of.backward(grad_output, v, {false, true}));
    }
    return results;
  }
  TensorTriple cpu() const {
    const auto of = checked();
    if (is_linear(of) || grad_output.numel() == 0) {
      return by_aten(of);
    }
    const auto in_opmath = [](const Tensor& tensor) {
      return tensor.defined() ? to_opmath(tensor).contiguous() : tensor;
    };
    const Tensor x = in_opmath(input), points = in_opmath(grid);
    const Tensor grad_grad_output =
        output_mask[0] ? at::empty_symint(of.output_sizes(), x.options()) : Tensor();
    const Tensor grad_input = output_mask[1] ? at::empty_like(x) : Tensor();
    const Tensor grad_grid = output_mask[2] ? at::empty_like(points) : Tensor();
    GRADNORM_KERNELS(grid_sample_kernels)
        .double_backward(
            grad_grad_output, grad_input, grad_grid, in_opmath(grad_grad_input), in_opmath(grad_grad_grid),
            in_opmath(grad_output), {x, points, padding_mode, align_corners});
    const auto narrow = [&](const Tensor& t) { return t.defined() ? t.to(input.scalar_type()) : t; };
    return {narrow(grad_grad_output), narrow(grad_input), narrow(grad_grid)};
  }
  TensorTriple meta() const {
    return zeros(checked(), output_mask);
  }
};

using Settings = std::tuple<int64_t, int64_t, bool>;

struct OfBackward {
  using Settings = grid_sample::Settings;

  static variable_list backward(
      const variable_list& grads, const variable_list& saved, Needs needs, const Settings& settings) {
    const auto [interpolation_mode, padding_mode, align_corners] = settings;
    // What of the results is zeros, as in DoubleBackward::by_aten.
    const bool is_nearest = interpolation_mode == kNearest;
    Mask<3> mask = needs;
    mask[1] = mask[1] && ((grads[1].defined() && !is_nearest) || is_zero_asked_for(1));
    mask[2] = mask[2] && (!is_nearest || is_zero_asked_for(2));
    return to_list(call(
        DoubleBackward{
            grads[0], grads[1], saved[0], saved[1], saved[2], interpolation_mode, padding_mode, align_corners,
            mask}));
  }
};

struct Backward {
  static constexpr auto schema =
      "grid_sample_backward(Tensor grad_output, Tensor input, Tensor grid, int interpolation_mode, "
      "int padding_mode, bool align_corners, bool[2] output_mask) -> (Tensor grad_input, Tensor grad_grid)";
  const Tensor &grad_output, &input, &grid;
  int64_t interpolation_mode, padding_mode;
  bool align_corners;
  Mask<2> output_mask;
  auto tie() const {
    return std::tie(grad_output, input, grid, interpolation_mode, padding_mode, align_corners, output_mask);
  }

  Sampling checked() const {
    const auto of = sampling(*this);
    of.check(grad_output);
    return of;
  }
  TensorPair composite() const {
    const auto of = checked();
    const Cells cells(of);
    const auto dtype = input.scalar_type();
    return {
        output_mask[0] ? cells.grad_input(grad_output, cells.weight()).to(dtype) : Tensor(),
        output_mask[1] ? cells.grad_grid(grad_output, input, cells.weight()).to(dtype) : Tensor()};
  }
  TensorPair any_device() const {
    return checked().backward(grad_output, input, output_mask);
  }
  TensorPair meta() const {
    checked();
    return {empty_contiguous(input, output_mask[0]), empty_contiguous(grid, output_mask[1])};
  }
  TensorPair recorded() const {
    const Settings settings{interpolation_mode, padding_mode, align_corners};
    return to_tuple<2>(record<OfBackward>({grad_output, input, grid}, settings, [&](variable_list& saved) {
      saved = {grad_output, input, grid};
      return to_list(any_device(), output_mask);
    }));
  }
  TensorPair autograd() const {
    return needs_composite(grad_output, input, grid) ? composite() : recorded();
  }
};

struct OfForward {
  using Settings = grid_sample::Settings;

  static variable_list backward(
      const variable_list& grads, const variable_list& saved, Needs needs, const Settings& settings) {
    const auto [interpolation_mode, padding_mode, align_corners] = settings;
    return to_list(
        call(Backward{grads[0], saved[0], saved[1], interpolation_mode, padding_mode, align_corners, needs}));
  }
};

struct Forward {
  static constexpr auto schema =
      "grid_sample(Tensor input, Tensor grid, int interpolation_mode, int padding_mode, "
      "bool align_corners) -> Tensor";
  const Tensor &input, &grid;
  int64_t interpolation_mode, padding_mode;
  bool align_corners;
  auto tie() const {
    return std::tie(input, grid, interpolation_mode, padding_mode, align_corners);
  }

  Sampling checked() const {
    const auto of = sampling(*this);
    of.check();
    return of;
  }
  Tensor composite() const {
    const auto of = checked();
    const Cells cells(of);
    return cells.samples(input, cells.weight()).to(input.scalar_type());
  }
  Tensor any_device() const {
    return checked().forward(input);
  }
  Tensor meta() const {
    return at::empty_symint(checked().output_sizes(), input.options());
  }
  Tensor autograd() const {
    if (needs_composite(input, grid)) {
      return composite();
    }
    const Settings settings{interpolation_mode, padding_mode, align_corners};
    return record<OfForward>({input, grid}, settings, [&](variable_list& saved) {
      saved = {input, grid};
      return variable_list{call(*this)};
    })[0];
  }
  // PyTorch's own is computed in float32 in a region of autocast, on CUDA in the wider dtype of the two.
  Tensor autocast() const {
    const auto device = input.device().type();
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(
        at::autocast::get_autocast_dispatch_key_from_device_type(device));
    const auto dtype =
        device == at::kCPU ? at::kFloat : at::promote_types(input.scalar_type(), grid.scalar_type());
    const auto cast = [&](const Tensor& t) { return at::autocast::cached_cast(dtype, t, device); };
    return call(Forward{cast(input), cast(grid), interpolation_mode, padding_mode, align_corners});
  }
};

const Registration<Forward, Backward, DoubleBackward> registration;

// PyTorch's own, of two and of three dimensions. It has no forward-mode derivative.
template <int dims>
struct AtenGridSampler : Override<AtenGridSampler<dims>> {
  static Tensor autograd(
      c10::DispatchKeySet keys, const Tensor& input, const Tensor& grid, int64_t interpolation_mode,
      int64_t padding_mode, bool align_corners) {
    const Forward op{input, grid, interpolation_mode, padding_mode, align_corners};
    return is_differentiated_by_transform({input, grid}) && sampling(op).is_covered()
               ? op.composite()
               : AtenGridSampler::stock(keys, input, grid, interpolation_mode, padding_mode, align_corners);
  }
};

template <int dims>
struct AtenGridSamplerBackward : Override<AtenGridSamplerBackward<dims>> {
  static TensorPair autograd(
      c10::DispatchKeySet keys, const Tensor& grad_output, const Tensor& input, const Tensor& grid,
      int64_t interpolation_mode, int64_t padding_mode, bool align_corners, Mask<2> output_mask) {
    const Backward op{grad_output, input, grid, interpolation_mode, padding_mode, align_corners, output_mask};
    return !needs_composite(grad_output, input, grid) && grad_output.layout() == at::kStrided &&
                   sampling(op).is_covered()
               ? op.recorded()
               : AtenGridSamplerBackward::stock(
                     keys, grad_output, input, grid, interpolation_mode, padding_mode, align_corners,
                     output_mask);
  }
};

const StockOverride override_aten([](AtenAutograd& aten) {
  AtenGridSampler<2>::install(aten, "grid_sampler_2d");
  AtenGridSampler<3>::install(aten, "grid_sampler_3d");
  AtenGridSamplerBackward<2>::install(aten, "grid_sampler_2d_backward");
  AtenGridSamplerBackward<3>::install(aten, "grid_sampler_3d_backward");
});

}  // namespace
}  // namespace gradnorm_kernels::grid_sample
