#include "recurrent.h"

#include "elementwise.h"

namespace gradnorm_kernels::CPU_CAPABILITY {
namespace recurrent {
namespace {

template <template <class> class Step>
void forward(at::TensorIteratorBase& iter) {
  elementwise<2, 5>(iter, [](const auto& in) {
    using V = typename std::decay_t<decltype(in)>::value_type;
    const auto& [p, q, r, s, state] = in;
    return Step<V>(p, q, r, s, state).values();
  });
}

template <template <class> class Step>
void backward(at::TensorIteratorBase& iter) {
  elementwise<5, 7>(iter, [](const auto& in) {
    using V = typename std::decay_t<decltype(in)>::value_type;
    const auto& [dh, dc, p, q, r, s, state] = in;
    return Step<V>(p, q, r, s, state).gradients(dh, dc);
  });
}

template <template <class> class Step>
void double_backward(at::TensorIteratorBase& iter) {
  elementwise<7, 12>(iter, [](const auto& in) {
    using V = typename std::decay_t<decltype(in)>::value_type;
    const auto& [vp, vq, vr, vs, v_state, dh, dc, p, q, r, s, state] = in;
    return Step<V>(p, q, r, s, state).second({vp, vq, vr, vs, v_state}, dh, dc);
  });
}

template <template <class> class Step>
constexpr RecurrentKernels kernels{forward<Step>, backward<Step>, double_backward<Step>};

}  // namespace
}  // namespace recurrent

const RecurrentKernels lstm_kernels = recurrent::kernels<LstmStep>;
const RecurrentKernels gru_kernels = recurrent::kernels<GruStep>;

}  // namespace gradnorm_kernels::CPU_CAPABILITY
