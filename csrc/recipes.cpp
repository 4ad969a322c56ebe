// Recipes (record in op.h) of what PyTorch's own nodes computed.
#include <torch/csrc/autograd/generated/Functions.h>

#include "op.h"

namespace gradnorm_kernels::recipes {
namespace {

using torch::autograd::generated::MulBackward0;

// A product of two tensors, both of which are kept where both are differentiated: gates, and scales of
// channels.
const bool registered = [] {
  detail::Recipe::of_nodes().emplace(
      typeid(MulBackward0), [](torch::autograd::Node& node) -> std::optional<detail::Recipe> {
        const auto& product = static_cast<MulBackward0&>(node);
        if (product.self_.has_hooks() || product.other_.has_hooks()) {
          return std::nullopt;
        }
        try {
          detail::Recipe recipe{{product.self_.unpack(), product.other_.unpack()}};
          recipe.again = [](const variable_list& saved, const c10::IValue&) {
            return at::mul(saved[0], saved[1]);
          };
          return recipe.saved[0].defined() && recipe.saved[1].defined() ? std::optional(recipe)
                                                                        : std::nullopt;
        } catch (const c10::Error&) {  // where they were freed, or changed in place
          return std::nullopt;
        }
      });
  return true;
}();

}  // namespace
}  // namespace gradnorm_kernels::recipes
