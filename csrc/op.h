// What makes an op of the dispatcher, and what makes it differentiable; every op family uses it.
//
// An op is a struct. Its members are the arguments, in the order of its schema, and its member functions are
// its implementations, each named after the dispatch key it is registered at. A call of the op is an object
// of the struct: call(DoubleBackward{.grad_output = g, .input = x}).
//
//   struct Op {
//     static constexpr auto schema = "op(Tensor input, Tensor? weight, float eps) -> Tensor";
//     const Tensor& input;
//     OptionalTensor weight;
//     double eps;
//     auto tie() const { return std::tie(input, weight, eps); }
//
//     Tensor composite() const;  // plain ATen ops; the op's result is its result
//     Tensor autograd() const;   // or differentiable(), see below
//     Tensor cpu() const;        // and meta, cuda, any_device, autocast, autocast_cuda, where there is one
//   };
//   const Registration<Op> registration;
//
// An op that only calls others has implicit() alone: it is differentiated and traced through them.
#pragma once

#include <ATen/SavedTensorHooks.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include <array>
#include <bitset>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <typeindex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "common.h"

namespace gradnorm_kernels {

using torch::autograd::variable_list;
using TensorPair = std::tuple<Tensor, Tensor>;
using TensorTriple = std::tuple<Tensor, Tensor, Tensor>;
// Which of an op's results are wanted.
template <size_t N>
using Mask = std::array<bool, N>;

// A tensor that may be undefined, in schemas a Tensor?.
struct OptionalTensor : Tensor {
  OptionalTensor() = default;
  OptionalTensor(const Tensor& tensor) : Tensor(tensor) {}
  OptionalTensor(const std::optional<Tensor>& tensor) : Tensor(tensor.value_or(Tensor())) {}
};

// What ATen takes for a tensor that may be undefined.
inline std::optional<Tensor> optional(const Tensor& tensor) {
  return tensor.defined() ? std::optional<Tensor>(tensor) : std::nullopt;
}

inline Tensor empty_contiguous(const Tensor& like, bool wanted = true) {
  return wanted ? at::empty_like(like, at::MemoryFormat::Contiguous) : Tensor();
}
inline Tensor zeros_contiguous(const Tensor& like, bool wanted = true) {
  return wanted ? at::zeros_like(like, at::MemoryFormat::Contiguous) : Tensor();
}

// Gradients, of which an undefined one is zero.
inline Tensor or_zeros(const Tensor& grad, const Tensor& like) {
  return grad.defined() ? grad : at::zeros_like(like);
}
inline Tensor plus(const Tensor& a, const Tensor& b) {
  return !a.defined() ? b : !b.defined() ? a : a + b;
}

namespace detail {

// The types of a member of an op, as the dispatcher passes it.
template <class Member>
struct Parameter {
  using type = Member;
  static const Member& pass(const Member& member) {
    return member;
  }
};
template <>
struct Parameter<Tensor> {
  using type = const Tensor&;
  static const Tensor& pass(const Tensor& member) {
    return member;
  }
};
template <>
struct Parameter<OptionalTensor> {
  using type = const std::optional<Tensor>&;
  static std::optional<Tensor> pass(const OptionalTensor& member) {
    return optional(member);
  }
};

template <class Op>
auto result_of(const Op& op) {
  if constexpr (requires { op.composite(); }) {
    return op.composite();
  } else if constexpr (requires { op.implicit(); }) {
    return op.implicit();
  } else if constexpr (requires { op.meta(); }) {
    return op.meta();
  }
}

template <class Op, class Members = decltype(std::declval<const Op&>().tie())>
struct Dispatched;

template <class Op, class... Members>
struct Dispatched<Op, std::tuple<const Members&...>> {
  using Result = decltype(result_of(std::declval<const Op&>()));
  using Signature = Result(typename Parameter<Members>::type...);

  // Put together at run time, where schemas of several ops differ in a part.
  static std::string schema() {
    if constexpr (requires { Op::schema(); }) {
      return Op::schema();
    } else {
      return Op::schema;
    }
  }
  static std::string name() {
    return schema().substr(0, schema().find('('));
  }
  static Result call(const Op& op) {
    static const auto handle = find_op<Signature>("gradnorm_kernels::" + name());
    return std::apply(
        [](const Members&... members) { return handle.call(Parameter<Members>::pass(members)...); },
        op.tie());
  }
  // An implementation with the arguments that the dispatcher gives.
  template <Result (Op::*implementation)() const>
  static Result implement(typename Parameter<Members>::type... arguments) {
    return (Op{arguments...}.*implementation)();
  }
  // At the Autograd key of an op whose result is itself differentiated only by its composite.
  static Result composite_where_differentiated(typename Parameter<Members>::type... arguments) {
    const Op op{arguments...};
    return std::apply(
        [&](const auto&... tensors) {
          if (needs_composite(tensors...) || torch::autograd::compute_requires_grad(tensors...)) {
            return op.composite();
          }
          at::AutoDispatchBelowADInplaceOrView guard;
          return call(op);
        },
        op.differentiable());
  }
};

}  // namespace detail

template <class Op>
const char* name_of() {
  static const auto name = detail::Dispatched<Op>::name();
  return name.c_str();
}

// Through the dispatcher.
template <class Op>
auto call(const Op& op) {
  return detail::Dispatched<Op>::call(op);
}
template <class Op>
auto call_below_autograd(const Op& op) {
  at::AutoDispatchBelowADInplaceOrView guard;
  return call(op);
}

// The ops of a family, defined and implemented at every key. Where an op has no implementation of its own for
// a device or under torch.func, its composite is taken; where it has differentiable(), the tensors that it
// can be differentiated by, in place of autograd(), the composite is taken as soon as one of them is
// differentiated.
template <class... Ops>
class Registration {
 public:
  Registration() {
    torch::Library definitions(
        torch::Library::FRAGMENT, "gradnorm_kernels", std::nullopt, __FILE__, __LINE__);
    (definitions.def(detail::Dispatched<Ops>::schema().c_str()), ...);
    libraries_.push_back(std::move(definitions));
#define GRADNORM_IMPLEMENT(key, function)                              \
  implement_at(c10::DispatchKey::key, [](torch::Library& m, auto op) { \
    using Op = typename decltype(op)::type;                            \
    if constexpr (requires(const Op& o) { o.function(); }) {           \
      using D = detail::Dispatched<Op>;                                \
      m.impl(name_of<Op>(), &D::template implement<&Op::function>);    \
    }                                                                  \
  })
    GRADNORM_IMPLEMENT(CPU, cpu);
    GRADNORM_IMPLEMENT(CUDA, cuda);
    GRADNORM_IMPLEMENT(Meta, meta);
    GRADNORM_IMPLEMENT(AutocastCPU, autocast);
    GRADNORM_IMPLEMENT(AutocastCUDA, autocast);
    GRADNORM_IMPLEMENT(AutocastCUDA, autocast_cuda);
    GRADNORM_IMPLEMENT(FuncTorchBatched, composite);
    GRADNORM_IMPLEMENT(Autograd, autograd);
    GRADNORM_IMPLEMENT(CompositeImplicitAutograd, implicit);
#undef GRADNORM_IMPLEMENT
    implement_at(c10::DispatchKey::Autograd, [](torch::Library& m, auto op) {
      using Op = typename decltype(op)::type;
      if constexpr (requires(const Op& o) { o.differentiable(); }) {
        m.impl(name_of<Op>(), &detail::Dispatched<Op>::composite_where_differentiated);
      }
    });
    implement_at(c10::DispatchKey::CompositeExplicitAutograd, [](torch::Library& m, auto op) {
      using Op = typename decltype(op)::type;
      using D = detail::Dispatched<Op>;
      if constexpr (requires(const Op& o) { o.any_device(); }) {
        m.impl(name_of<Op>(), &D::template implement<&Op::any_device>);
      } else if constexpr (requires(const Op& o) { o.composite(); }) {
        m.impl(name_of<Op>(), &D::template implement<&Op::composite>);
      }
    });
  }

 private:
  template <class Implement>
  void implement_at(c10::DispatchKey key, const Implement& implement) {
    torch::Library library(torch::Library::IMPL, "gradnorm_kernels", key, __FILE__, __LINE__);
    (implement(library, std::type_identity<Ops>()), ...);
    libraries_.push_back(std::move(library));
  }

  std::vector<torch::Library> libraries_;
};

// The derivatives of evaluation mode are of the statistics that it read.
inline constexpr auto kIfChanged =
    "If that is the mean or variance of a BatchNorm: a forward in train mode changed it before the "
    "backward of one in eval mode. Call backward first, or use a copy of the model in eval mode.";

// Which of the tensors that were differentiated need a gradient.
struct Needs : std::bitset<8> {
  template <size_t N>
  operator Mask<N>() const {
    Mask<N> mask;
    for (size_t i = 0; i < N; ++i) {
      mask[i] = test(i);
    }
    return mask;
  }
};

// The first N tensors, as ops return them.
template <size_t N>
auto to_tuple(const variable_list& tensors) {
  return [&]<size_t... i>(std::index_sequence<i...>) {
    return std::make_tuple(tensors[i]...);
  }(std::make_index_sequence<N>());
}
inline variable_list to_list(const Tensor& tensor) {
  return {tensor};
}
template <class... Tensors>
variable_list to_list(const std::tuple<Tensors...>& tensors) {
  return std::apply([](const auto&... tensor) { return variable_list{tensor...}; }, tensors);
}
// Those that are wanted: some of ATen's kernels return more.
template <class... Tensors>
variable_list to_list(const std::tuple<Tensors...>& tensors, const Mask<sizeof...(Tensors)>& wanted) {
  auto list = to_list(tensors);
  for (size_t i = 0; i < list.size(); ++i) {
    if (!wanted[i]) {
      list[i].reset();
    }
  }
  return list;
}

namespace detail {

// An autograd Function has neither undefined operands nor undefined outputs: it is given the defined ones of
// several tensors, and knows where these belong.
struct Places {
  int64_t defined = 0;  // a bit for each tensor
  int64_t count = 0;

  variable_list gather(at::TensorList tensors) {
    count = static_cast<int64_t>(tensors.size());
    variable_list gathered;
    for (int64_t i = 0; i < count; ++i) {
      if (tensors[i].defined()) {
        defined |= int64_t{1} << i;
        gathered.push_back(tensors[i]);
      }
    }
    return gathered;
  }
  bool has(int64_t i) const {
    return defined >> i & 1;
  }
  variable_list scatter(const variable_list& gathered) const {
    variable_list tensors(count);
    auto next = gathered.begin();
    for (int64_t i = 0; i < count; ++i) {
      if (has(i)) {
        tensors[i] = *next++;
      }
    }
    return tensors;
  }
};

// How the first result of a node is made again from what the node saved, for another node that would save
// that result.
struct Recipe {
  using Make = Tensor (*)(const variable_list& saved, const c10::IValue& settings);
  variable_list saved;
  Make again;
  c10::IValue settings;
  c10::IValue recipes;  // of the saved tensors that are themselves made again; see Recipes

  Tensor make() const;  // called below autograd

  // By the type of the node; filled while the library is loaded.
  using Of = std::optional<Recipe> (*)(torch::autograd::Node& node);
  static std::unordered_map<std::type_index, Of>& of_nodes() {
    static auto* const by_type = new std::unordered_map<std::type_index, Of>();
    return *by_type;
  }
  // Of what a node computed and nobody changed since.
  static std::optional<Recipe> of(const Tensor& result) {
    if (!result.requires_grad() || result.is_leaf() || result.is_view() || result._version() != 0 ||
        result.output_nr() != 0) {
      return std::nullopt;
    }
    auto& node = *result.grad_fn();
    const auto found = of_nodes().find(typeid(node));
    return found == of_nodes().end() ? std::nullopt : found->second(node);
  }
};

// Recipes in the place of some of a node's saved tensors. What they take is saved behind these.
struct Recipes : torch::CustomClassHolder {
  struct Entry {
    size_t place;      // among the saved tensors
    uint32_t operand;  // which it was, as the node knows its operands
    Recipe recipe;     // without its tensors,
    size_t count;      // which are so many
    // Of the tensor, which may be a view of what the recipe makes.
    std::vector<c10::SymInt> sizes, strides;
    c10::SymInt offset;
    at::TensorOptions options;
  };
  std::vector<Entry> entries;

  void take(size_t place, variable_list& saved, at::TensorList operands) {
    const auto* const operand = std::find_if(operands.begin(), operands.end(), [&](const Tensor& tensor) {
      return saved[place].defined() && tensor.is_same(saved[place]);
    });
    if (operand == operands.end()) {
      return;
    }
    if (auto recipe = Recipe::of(operand->is_view() ? Tensor(operand->_base()) : *operand)) {
      saved.insert(saved.end(), recipe->saved.begin(), recipe->saved.end());
      const size_t count = recipe->saved.size();
      recipe->saved.clear();
      entries.push_back(
          {place, static_cast<uint32_t>(operand - operands.begin()), std::move(*recipe), count,
           operand->sym_sizes().vec(), operand->sym_strides().vec(), operand->sym_storage_offset(),
           operand->options()});
      saved[place].reset();
    }
  }
  // after(entry, tensor) hears of each one that is back, and what is_wanted says of an entry decides whether
  // it is.
  template <class IsWanted, class After>
  void put_back(variable_list& saved, const IsWanted& is_wanted, const After& after) const {
    auto end = saved.end();
    for (auto entry = entries.rbegin(); entry != entries.rend(); ++entry) {
      const auto begin = end - static_cast<int64_t>(entry->count);
      if (is_wanted(*entry)) {
        Recipe recipe = entry->recipe;
        recipe.saved.assign(begin, end);
        at::AutoDispatchBelowADInplaceOrView guard;
        const Tensor made = recipe.make();
        saved[entry->place] = made.sym_sizes() == entry->sizes && made.sym_strides() == entry->strides
                                  ? made
                                  : made.as_strided_symint(entry->sizes, entry->strides, entry->offset);
      }
      after(*entry, saved[entry->place]);
      end = begin;
    }
    saved.erase(end, saved.end());
  }
  static const Recipes* of(const c10::IValue& capsule) {
    return capsule.isNone() ? nullptr : static_cast<const Recipes*>(capsule.toCapsule().get());
  }
};

inline Tensor Recipe::make() const {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  variable_list tensors = saved;
  if (const auto* nested = Recipes::of(recipes)) {
    nested->put_back(tensors, [](const auto&) { return true; }, [](const auto&, const Tensor&) {});
  }
  return again(tensors, settings);
}

template <class Derivative>
struct Recorded : torch::autograd::Function<Recorded<Derivative>> {
  using Settings = typename Derivative::Settings;
  using Compute = c10::function_ref<variable_list(variable_list& saved)>;
  static constexpr bool has_recipe =
      requires(const variable_list& saved, const Settings& settings) { Derivative::again(saved, settings); };
  static constexpr bool takes_recipes = requires { Derivative::made_again; };

  static variable_list forward(
      torch::autograd::AutogradContext* ctx, at::TensorList differentiated, const Places& operands,
      const Settings& settings, Compute compute, Places* results) {
    ctx->set_materialize_grads(false);
    at::AutoDispatchBelowADInplaceOrView guard;
    variable_list saved;
    const auto outputs = results->gather(compute(saved));
    // What hooks on saved tensors pack, they may not be asked to unpack before the backward. A compiler
    // decides for itself what it computes again.
    const bool may_make_again = !at::SavedTensorDefaultHooks::get_hooks() && !is_tracing();
    [[maybe_unused]] bool is_known = has_recipe && is_registered && may_make_again;
    if constexpr (takes_recipes) {
      Recipes recipes;
      for (const size_t place : Derivative::made_again) {
        if (may_make_again) {
          recipes.take(place, saved, differentiated);
        }
        if constexpr (requires { Derivative::is_saved_for_again; }) {
          is_known &= !saved[place].defined();
          saved[place].reset();
        }
      }
      if (!recipes.entries.empty()) {
        ctx->saved_data["recipes"] =
            c10::IValue::make_capsule(c10::make_intrusive<Recipes>(std::move(recipes)));
      }
    }
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["state"] =
        std::make_tuple(settings, operands.defined, operands.count, results->defined, results->count);
    if (is_known) {
      ctx->saved_data["has_recipe"] = true;
    }
    if constexpr (requires { Derivative::is_in_place; }) {
      ctx->mark_dirty(outputs);
    }
    if constexpr (requires { Derivative::differentiable_results; }) {
      ctx->mark_non_differentiable(
          variable_list(outputs.begin() + Derivative::differentiable_results, outputs.end()));
    }
    return outputs;
  }

  static variable_list backward(torch::autograd::AutogradContext* ctx, const variable_list& outputs) {
    const auto [settings, defined, count, defined_results, result_count] =
        ctx->saved_data["state"].template to<std::tuple<Settings, int64_t, int64_t, int64_t, int64_t>>();
    const Places operands{defined, count}, results{defined_results, result_count};
    variable_list gradients;
    if (std::any_of(outputs.begin(), outputs.end(), [](const Tensor& grad) { return grad.defined(); })) {
      Needs needs;
      for (int64_t i = 0, next = 0; i < count; ++i) {
        needs[i] = operands.has(i) && ctx->needs_input_grad(next++);
      }
      variable_list saved = saved_by(*ctx);
      if constexpr (takes_recipes) {
        put_back(*ctx, saved, needs);
      }
      gradients = Derivative::backward(results.scatter(outputs), std::move(saved), needs, settings);
    }
    gradients.resize(count);
    variable_list of_inputs;
    for (int64_t i = 0; i < count; ++i) {
      if (operands.has(i)) {
        of_inputs.push_back(std::move(gradients[i]));
      }
    }
    constexpr size_t others = 4;  // of forward's arguments
    of_inputs.resize(of_inputs.size() + others);
    return of_inputs;
  }

 private:
  // Raises where one was changed in place since.
  static variable_list saved_by(const torch::autograd::AutogradContext& ctx) {
    if constexpr (requires { Derivative::if_changed; }) {
      try {
        return ctx.get_saved_variables();
      } catch (const c10::Error& error) {
        TORCH_CHECK(false, error.what_without_backtrace(), " ", Derivative::if_changed);
      }
    } else {
      return ctx.get_saved_variables();
    }
  }

  static c10::IValue recipes_of(const torch::autograd::AutogradContext& ctx) {
    const auto found = ctx.saved_data.find("recipes");
    return found == ctx.saved_data.end() ? c10::IValue() : found->second;
  }
  // What is read, with its place in the graph.
  static void put_back(
      const torch::autograd::AutogradContext& ctx, variable_list& saved, const Needs& needs) {
    const auto capsule = recipes_of(ctx);
    const auto* recipes = Recipes::of(capsule);
    if (!recipes) {
      return;
    }
    const auto is_read = [&](const Recipes::Entry& entry) {
      if constexpr (requires { &Derivative::is_read; }) {
        return Derivative::is_read(entry.place, needs);
      }
      return true;
    };
    recipes->put_back(saved, is_read, [&](const Recipes::Entry& entry, Tensor& tensor) {
      if (!tensor.defined() && requires { Derivative::reads_shapes; }) {
        at::AutoDispatchBelowADInplaceOrView guard;
        tensor = at::empty_strided_symint(entry.sizes, entry.strides, entry.options);
      }
      if (tensor.defined() && c10::GradMode::is_enabled()) {
        torch::autograd::impl::set_gradient_edge(
            tensor, torch::autograd::get_current_node()->next_edge(entry.operand));
      }
    });
  }

  static std::optional<Recipe> recipe_of(torch::autograd::Node& node) {
    const auto& ctx = static_cast<torch::autograd::CppNode<Recorded>&>(node).ctx_;
    if (ctx.saved_data.find("has_recipe") == ctx.saved_data.end()) {
      return std::nullopt;
    }
    try {
      return Recipe{ctx.get_saved_variables(), &make, ctx.saved_data.at("state"), recipes_of(ctx)};
    } catch (const c10::Error&) {  // where they were freed, or changed in place
      return std::nullopt;
    }
  }
  static Tensor make(const variable_list& saved, const c10::IValue& state) {
    return Derivative::again(saved, state.toTupleRef().elements()[0].to<Settings>());
  }
  static inline const bool is_registered = [] {
    if constexpr (has_recipe) {
      Recipe::of_nodes().emplace(typeid(torch::autograd::CppNode<Recorded>), &recipe_of);
    }
    return true;
  }();
};

}  // namespace detail

// What compute returns, recorded as a function of the tensors in differentiated, some of which may be
// undefined. compute runs below autograd and may leave results undefined; it puts into its argument what is
// saved for Derivative, which gives their gradients. settings are read after it has run.
//
//   struct Derivative {
//     using Settings = std::tuple<...>;  // what is saved beside tensors
//     // grads: of the results, at least one defined. Returns the gradients of differentiated.
//     static variable_list backward(
//         const variable_list& grads, const variable_list& saved, Needs needs, const Settings& settings);
//
//     // Where the first result is cheap to make again from what is saved: what does it.
//     static Tensor again(const variable_list& saved, const Settings& settings);
//
//     // Where operands that are such results of other nodes are not to be saved, but made again: their
//     // places among the saved tensors,
//     static constexpr std::array made_again{0};
//     // which of them backward reads, by default all; others are undefined
//     static bool is_read(size_t place, Needs needs);
//     // or, where their shapes are read, empty tensors.
//     static constexpr bool reads_shapes = true;
//     // Where only again() reads them: they are not saved if they cannot be made again.
//     static constexpr bool is_saved_for_again = true;
//   };
template <class Derivative>
variable_list record(
    at::TensorList differentiated, const typename Derivative::Settings& settings,
    typename detail::Recorded<Derivative>::Compute compute) {
  if (!torch::autograd::compute_requires_grad(differentiated)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    variable_list unused;
    return compute(unused);
  }
  detail::Places operands, results;
  const auto given = operands.gather(differentiated);
  const auto outputs =
      detail::Recorded<Derivative>::apply(at::TensorList(given), operands, settings, compute, &results);
  return results.scatter(outputs);
}

// PyTorch's own op, whose Autograd key has Self::autograd while set_fused_double_backward is on. That takes
// the dispatch keys and then the op's arguments, and leaves to stock() what ours does not cover.
template <class Self>
struct Override {
  template <class... Args>
  static auto stock(c10::DispatchKeySet keys, Args&&... args) {
    return call_stock(&Self::autograd, keys, args...);
  }
  static void install(AtenAutograd& aten, const std::string& op) {
    keep(op);
    aten.impl(op, switched(&Self::autograd));
  }
  static void install_whole(AtenAutograd& aten, const std::string& op) {
    keep(op);
    aten.impl_whole(op, switched(&Self::autograd));
  }

 private:
  static void keep(const std::string& op) {
    const auto dot = op.find('.');
    kernel.emplace("aten::" + op.substr(0, dot), dot == std::string::npos ? "" : op.substr(dot + 1));
  }
  template <class Return, class... Args>
  static Return call_stock(
      Return (*)(c10::DispatchKeySet, Args...), c10::DispatchKeySet keys,
      std::type_identity_t<Args>... args) {
    return kernel->template call<Return, Args...>(keys, std::forward<Args>(args)...);
  }
  template <class Return, class... Args>
  static auto switched(Return (*)(c10::DispatchKeySet, Args...)) {
    return +[](c10::DispatchKeySet keys, Args... args) -> Return {
      return is_fused_double_backward_enabled()
                 ? Self::autograd(keys, std::forward<Args>(args)...)
                 : call_stock(&Self::autograd, keys, std::forward<Args>(args)...);
    };
  }

  static inline std::optional<StockKernel> kernel;
};

// The arguments of an op of PyTorch's on the stack, found by name.
struct AtenArguments {
  const c10::FunctionSchema& schema;
  at::ArrayRef<c10::IValue> values;

  AtenArguments(const c10::OperatorHandle& op, const torch::jit::Stack& stack)
      : schema(op.schema()), values(torch::jit::last(stack, schema.arguments().size())) {}
  // Under the first of these names that there is.
  c10::IValue get(std::initializer_list<const char*> names) const {
    for (const auto* name : names) {
      if (const auto index = schema.argumentIndexWithName(name)) {
        return values[*index];
      }
    }
    return c10::IValue();
  }
  Tensor tensor(std::initializer_list<const char*> names) const {
    return OptionalTensor(get(names).toOptional<Tensor>());
  }
};

// As Override, of several ops whose schemas differ: Self::autograd takes the op, keys and a stack. Self may
// have an is_on() of its own.
template <class Self>
struct BoxedOverride {
  static bool is_on() {
    return is_fused_double_backward_enabled();
  }
  static void stock(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
    kernels().at(op.operator_name().name).call_boxed(keys, *stack);
  }
  // Not every release has every op.
  static void install(AtenAutograd& aten, const std::string& op) {
    const auto name = "aten::" + op;
    if (c10::Dispatcher::singleton().findSchema({name, ""})) {
      kernels().try_emplace(name, name);
      aten.impl(name, torch::CppFunction::makeFromBoxedFunction<&switched>());
    }
  }

 private:
  static void switched(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
    Self::is_on() ? Self::autograd(op, keys, stack) : stock(op, keys, stack);
  }

  // Made on first use: the library's overrides are installed while its static objects are initialised.
  static std::map<std::string, StockKernel>& kernels() {
    static auto* const by_name = new std::map<std::string, StockKernel>();
    return *by_name;
  }
};

}  // namespace gradnorm_kernels
