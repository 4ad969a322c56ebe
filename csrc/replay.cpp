// Launches of Triton's kernels without Python, behind an environment variable (kernels/replay.py).
//
// What a launcher does depends on its operands' layouts, its other arguments and a few of PyTorch's settings:
// the key. The first call of each key is Python's, while the ops that it calls and the kernels that it
// launches are noted. Later calls do the same from here, with their own operands.
#include <ATen/Context.h>
#include <ATen/DynamicLibrary.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <array>
#include <bit>
#include <memory>
#include <optional>
#include <shared_mutex>
#include <unordered_map>
#include <variant>
#include <vector>

#include "common.h"

namespace gradnorm_kernels::replay {

namespace {

using c10::IValue;
using torch::jit::Stack;

// The dispatch keys at which Python registers the launchers, of devices that none of our ops has kernels for:
// as they are, and noting their kernels.
constexpr c10::DispatchKeySet plain(c10::DispatchKey::PrivateUse2);
constexpr c10::DispatchKeySet noting(c10::DispatchKey::PrivateUse3);
// A key before all others, which nothing else uses. A launcher's ops come to it while they are noted; what
// they call themselves does not.
constexpr auto hook = c10::DispatchKey::TESTING_ONLY_GenericMode;

// A call's tensors are numbered: its operands, and then what its ops return. This is the number of one of
// them, or, where that is negative, what is the same in every call.
struct Value {
  int tensor = -1;
  IValue constant;

  IValue in(const std::vector<Tensor>& tensors) const {
    return tensor < 0 ? constant : IValue(tensors[tensor]);
  }
};

// Calls the function with each tensor, and is false for what is none and no list of them.
template <class Function>
bool for_each_tensor(const IValue& value, const Function& function) {
  if (value.isTensor()) {
    function(value.toTensor());
    return true;
  }
  if (value.isTensorList()) {
    for (const Tensor& tensor : value.toTensorVector()) {
      function(tensor);
    }
    return true;
  }
  return false;
}

struct Call {
  c10::OperatorHandle op;
  std::vector<Value> arguments;

  void run(std::vector<Tensor>& tensors) const {
    Stack stack;
    for (const auto& argument : arguments) {
      stack.push_back(argument.in(tensors));
    }
    op.callBoxed(stack);
    for (const auto& result : stack) {
      for_each_tensor(result, [&](const Tensor& tensor) { tensors.push_back(tensor); });
    }
  }
};

struct Launch {
  // The address of a tensor or, where its number is negative, the bits.
  struct Argument {
    int tensor;
    int64_t bits;
  };

  void* function;
  std::array<unsigned, 3> grid;
  unsigned threads;
  unsigned shared_memory;
  std::vector<Argument> arguments;

  void run(const std::vector<Tensor>& tensors) const {
    c10::SmallVector<int64_t, 128> values;
    for (const auto& [tensor, bits] : arguments) {
      values.push_back(tensor < 0 ? bits : reinterpret_cast<int64_t>(tensors[tensor].data_ptr()));
    }
    // Triton's kernels end in two more pointers, to memory that these do not need.
    values.append(2, 0);
    c10::SmallVector<void*, 128> pointers;
    for (auto& value : values) {
      pointers.push_back(&value);
    }
    const auto device = tensors[0].device();
    void* stream = nullptr;
    if (device.is_cuda()) {  // which it is not in tests
      stream = c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
    }
    run(device.index(), stream, pointers.data());
  }

 private:
  void run(int device, void* stream, void** values) const {
#ifdef _WIN32
    static at::DynamicLibrary driver("nvcuda.dll", nullptr, /*leak_handle=*/true);
#else
    static at::DynamicLibrary driver("libcuda.so.1", nullptr, /*leak_handle=*/true);
#endif
    static const auto launch = reinterpret_cast<int (*)(
        void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**)>(
        driver.sym("cuLaunchKernel"));
    static const auto get_context = reinterpret_cast<int (*)(void**)>(driver.sym("cuCtxGetCurrent"));
    static const auto retain = reinterpret_cast<int (*)(void**, int)>(driver.sym("cuDevicePrimaryCtxRetain"));
    static const auto set_context = reinterpret_cast<int (*)(void*)>(driver.sym("cuCtxSetCurrent"));
    void* context = nullptr;
    int error = get_context(&context);
    // A thread has none before its first call of CUDA's runtime.
    if (error == 0 && !context) {
      error = retain(&context, device);
      error = error == 0 ? set_context(context) : error;
    }
    if (error == 0) {
      error =
          launch(function, grid[0], grid[1], grid[2], threads, 1, 1, shared_memory, stream, values, nullptr);
    }
    TORCH_CHECK(error == 0, "CUDA's driver could not launch a kernel: CUresult ", error);
  }
};

struct Plan {
  std::vector<std::variant<Call, Launch>> steps;
  std::vector<Value> results;
  // After each step, those that no other needs.
  std::vector<std::vector<int>> released;

  // The first so many tensors are operands.
  void release(size_t operands, size_t tensors) {
    std::vector<size_t> last_step(tensors, steps.size());
    for (size_t step = 0; step < steps.size(); ++step) {
      const auto note_uses = [&](const auto& call_or_launch) {
        for (const auto& argument : call_or_launch.arguments) {
          if (argument.tensor >= 0) {
            last_step[argument.tensor] = step;
          }
        }
      };
      std::visit(note_uses, steps[step]);
    }
    for (const auto& result : results) {
      if (result.tensor >= 0) {
        last_step[result.tensor] = steps.size();
      }
    }
    released.resize(steps.size() + 1);
    for (size_t tensor = operands; tensor < tensors; ++tensor) {
      released[last_step[tensor]].push_back(static_cast<int>(tensor));
    }
    released.pop_back();  // by whoever has the results
  }

  void run(std::vector<Tensor> tensors, Stack& stack) const {
    const c10::DeviceGuard guard(tensors[0].device());
    for (size_t step = 0; step < steps.size(); ++step) {
      std::visit([&](const auto& call_or_launch) { call_or_launch.run(tensors); }, steps[step]);
      for (const int tensor : released[step]) {
        tensors[tensor].reset();
      }
    }
    for (const auto& result : results) {
      stack.push_back(result.in(tensors));
    }
  }
};

// What is noted of the first call, as long as it can be repeated.
struct Recording {
  std::vector<Tensor> tensors;
  std::optional<Plan> plan = Plan();

  // Python may be given another tensor of the same memory than an op made.
  int find(const Tensor& tensor) const {
    const auto same = [&](const Tensor& other) {
      return other.is_same(tensor) ||
             (other.defined() && tensor.defined() && other.is_alias_of(tensor) &&
              other.scalar_type() == tensor.scalar_type() && other.sizes() == tensor.sizes() &&
              other.strides() == tensor.strides() && other.storage_offset() == tensor.storage_offset());
    };
    const auto found = std::find_if(tensors.begin(), tensors.end(), same);
    return found == tensors.end() ? -1 : static_cast<int>(found - tensors.begin());
  }

  Value number(const IValue& value) {
    if (!value.isTensor()) {
      if (value.isList() && !value.isIntList() && !value.isDoubleList() && !value.isBoolList()) {
        plan.reset();  // some lists hold tensors
      }
      return {-1, value};
    }
    const Tensor& tensor = value.toTensor();
    const int found = find(tensor);
    // A number among an op's tensors is part of the key.
    if (found < 0 && tensor.defined() && !tensor.unsafeGetTensorImpl()->is_wrapped_number()) {
      plan.reset();
    }
    // Nothing that a plan need not keep.
    return {found, found < 0 ? value : IValue()};
  }

  void add(const c10::OperatorHandle& op, c10::ArrayRef<IValue> arguments, c10::ArrayRef<IValue> results) {
    bool has_tensors = false, is_meta = false, is_known = true, only_tensors = true;
    const auto look = [&](const Tensor& tensor) {
      has_tensors = true;
      is_meta |= tensor.defined() && tensor.is_meta();
    };
    for (const auto& argument : arguments) {
      for_each_tensor(argument, look);
    }
    for (const auto& result : results) {
      only_tensors &= for_each_tensor(result, look);
      for_each_tensor(result, [&](const Tensor& tensor) { is_known &= find(tensor) >= 0; });
    }
    // Functions of the key, and contiguous() of what is.
    if (!plan || !has_tensors || is_meta || (only_tensors && is_known && !op.schema().is_mutable())) {
      return;
    }
    if (!only_tensors || op.hasTag(at::Tag::data_dependent_output) ||
        op.hasTag(at::Tag::dynamic_output_shape)) {
      plan.reset();
      return;
    }
    Call call{op, {}};
    for (const auto& argument : arguments) {
      call.arguments.push_back(number(argument));
    }
    add(std::move(call));
    for (const auto& result : results) {
      for_each_tensor(result, [&](const Tensor& tensor) { tensors.push_back(tensor); });
    }
  }

  void add(std::variant<Call, Launch> step) {
    if (plan) {
      plan->steps.push_back(std::move(step));
    }
  }
};

// Of the call whose ops come to the hook.
thread_local Recording* recording = nullptr;

void note_call(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  const c10::impl::ExcludeDispatchKeyGuard not_what_it_calls(hook);
  auto* const current = recording;
  const auto arguments = torch::jit::last(*stack, op.schema().arguments().size()).vec();
  op.callBoxed(stack);
  TORCH_INTERNAL_ASSERT(current);
  current->add(op, arguments, torch::jit::last(*stack, op.schema().returns().size()));
}

// Of the parameters, bits are those of the ones that pointers has no tensor for. What cannot be launched from
// here has no function.
void note_launch(
    int64_t function, at::IntArrayRef grid, int64_t threads, int64_t shared_memory,
    const c10::List<std::optional<Tensor>>& pointers, at::IntArrayRef bits) {
  Launch launch{
      reinterpret_cast<void*>(function),
      {1, 1, 1},
      static_cast<unsigned>(threads),
      static_cast<unsigned>(shared_memory),
      {}};
  std::copy(grid.begin(), grid.end(), launch.grid.begin());
  bool is_known = function != 0;
  for (size_t i = 0; i < bits.size(); ++i) {
    const std::optional<Tensor> tensor = pointers[i];
    const int number = tensor ? recording->find(*tensor) : -1;
    is_known &= !tensor || number >= 0;
    launch.arguments.push_back({number, bits[i]});
  }
  if (is_known) {
    recording->add(std::move(launch));
  } else {
    recording->plan.reset();
  }
}

using Key = std::vector<int64_t>;

struct Hash {
  size_t operator()(const Key& key) const {
    uint64_t hash = key.size();
    for (const int64_t word : key) {
      hash = (std::rotl(hash, 23) ^ static_cast<uint64_t>(word)) * 0x9E3779B97F4A7C15;
    }
    return hash ^ hash >> 32;
  }
};

void describe(const Tensor& tensor, Key& key, std::vector<Tensor>& operands) {
  key.push_back(tensor.defined());
  if (!tensor.defined()) {
    return;
  }
  key.insert(key.end(), {static_cast<int64_t>(tensor.scalar_type()), tensor.device().index(), tensor.dim()});
  key.insert(key.end(), tensor.sizes().begin(), tensor.sizes().end());
  key.insert(key.end(), tensor.strides().begin(), tensor.strides().end());
  // Triton compiles for addresses that are multiples of 16, and for others.
  const auto address = reinterpret_cast<int64_t>(tensor.const_data_ptr());
  key.push_back(address % 16);
  // The launcher is given one tensor where two operands are the same.
  const auto same = [&](const Tensor& other) { return other.is_alias_of(tensor); };
  const auto first = std::find_if(operands.begin(), operands.end(), same);
  key.push_back(first - operands.begin());
  if (first != operands.end()) {
    key.push_back(address - reinterpret_cast<int64_t>(first->const_data_ptr()));
  }
  operands.push_back(tensor);
}

template <class List>
void describe_list(const List& list, Key& key) {
  key.push_back(list.size());
  for (const auto element : list) {
    if constexpr (std::is_same_v<decltype(element), const double>) {
      key.push_back(std::bit_cast<int64_t>(element));
    } else {
      key.push_back(static_cast<int64_t>(element));
    }
  }
}

// False for arguments of kinds that no launcher has.
bool describe(c10::ArrayRef<IValue> arguments, Key& key, std::vector<Tensor>& operands) {
  const auto& context = at::globalContext();
  const auto precision = context.float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL);
  key.reserve(256);
  key.insert(
      key.end(), {static_cast<int64_t>(precision), context.deterministicAlgorithms(),
                  context.deterministicAlgorithmsWarnOnly()});
  for (const auto& argument : arguments) {
    if (argument.isTensor()) {
      key.push_back('t');
      if (argument.toTensor().defined() &&
          (argument.toTensor().layout() != at::kStrided || !argument.toTensor().has_storage())) {
        return false;
      }
      describe(argument.toTensor(), key, operands);
    } else if (argument.isNone()) {
      key.push_back('n');
    } else if (argument.isInt()) {
      key.insert(key.end(), {'i', argument.toInt()});
    } else if (argument.isDouble()) {
      key.insert(key.end(), {'d', std::bit_cast<int64_t>(argument.toDouble())});
    } else if (argument.isBool()) {
      key.insert(key.end(), {'b', argument.toBool()});
    } else if (argument.isString()) {
      describe_list(argument.toStringView(), key);
    } else if (argument.isIntList()) {
      describe_list(argument.toIntVector(), key);
    } else if (argument.isDoubleList()) {
      describe_list(argument.toDoubleVector(), key);
    } else if (argument.isBoolList()) {
      describe_list(argument.toBoolList().vec(), key);
    } else {
      return false;
    }
  }
  return !operands.empty();
}

// Of an op.
class Replay final : public c10::OperatorKernel {
 public:
  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
    const auto arguments = torch::jit::last(*stack, op.schema().arguments().size());
    Key key;
    std::vector<Tensor> operands;
    if (!describe(arguments, key, operands)) {
      op.redispatchBoxed(plain, stack);
      return;
    }
    const auto known = find(key);
    if (known && *known) {
      torch::jit::drop(*stack, arguments.size());
      (*known)->run(std::move(operands), *stack);
    } else if (known || c10::impl::tls_is_dispatch_key_excluded(hook)) {
      op.redispatchBoxed(plain, stack);
    } else {
      record(op, std::move(key), {std::move(operands)}, stack);
    }
  }

 private:
  // Null for what cannot be repeated.
  using Known = std::shared_ptr<const Plan>;

  std::optional<Known> find(const Key& key) const {
    const std::shared_lock lock(mutex_);
    const auto found = plans_.find(key);
    return found == plans_.end() ? std::nullopt : std::optional(found->second);
  }

  void record(const c10::OperatorHandle& op, Key&& key, Recording&& current, Stack* stack) {
    const auto operands = current.tensors.size();
    {
      recording = &current;
      const c10::impl::IncludeDispatchKeyGuard note(hook);
      op.redispatchBoxed(noting, stack);
    }
    std::vector<Value> results;
    for (const auto& result : torch::jit::last(*stack, op.schema().returns().size())) {
      results.push_back(current.number(result));
    }
    Known known;
    if (current.plan) {
      current.plan->results = std::move(results);
      current.plan->release(operands, current.tensors.size());
      known = std::make_shared<const Plan>(std::move(*current.plan));
    }
    const std::unique_lock lock(mutex_);
    if (plans_.size() == most_plans) {
      plans_.clear();
    }
    plans_.emplace(std::move(key), std::move(known));
  }

  // Of different shapes, as those of sentences, there is no end.
  static constexpr size_t most_plans = 4096;
  mutable std::shared_mutex mutex_;
  std::unordered_map<Key, Known, Hash> plans_;
};

void replay(const std::vector<std::string>& ops) {
  // Never destroyed at exit, when the dispatcher may already be gone.
  static auto* kernels = new torch::Library(
      torch::Library::IMPL, "gradnorm_kernels", c10::DispatchKey::CUDA, __FILE__, __LINE__);
  static auto* fallback = new torch::Library(torch::Library::IMPL, "_", hook, __FILE__, __LINE__);
  for (const auto& op : ops) {
    kernels->impl(op.c_str(), torch::CppFunction::makeFromBoxedFunctor(std::make_unique<Replay>()));
  }
  fallback->fallback(torch::CppFunction::makeFromBoxedFunction<&note_call>());
}

TORCH_LIBRARY_FRAGMENT(gradnorm_kernels, m) {
  m.def("_replay(str[] ops) -> ()", [](const std::vector<std::string>& ops) { replay(ops); });
  m.def(
      "_note_launch(int function, int[] grid, int threads, int shared_memory, Tensor?[] pointers, "
      "int[] bits) -> ()",
      [](int64_t, at::IntArrayRef, int64_t, int64_t, const c10::List<std::optional<Tensor>>&,
         at::IntArrayRef) {});
}

TORCH_LIBRARY_IMPL(gradnorm_kernels, TESTING_ONLY_GenericMode, m) {
  m.impl("_note_launch", &note_launch);
}

}  // namespace

}  // namespace gradnorm_kernels::replay
