#include "lstm.h"

#include "elementwise.h"

namespace gradnorm_kernels::CPU_CAPABILITY {
namespace lstm {
namespace {

void forward(at::TensorIteratorBase& iter) {
  elementwise<2, 5>(iter, [](const auto& in) {
    const auto& [i, f, g, o, cell] = in;
    return LstmStep(i, f, g, o, cell).values();
  });
}

void backward(at::TensorIteratorBase& iter) {
  elementwise<5, 7>(iter, [](const auto& in) {
    const auto& [dh, dc, i, f, g, o, cell] = in;
    return LstmStep(i, f, g, o, cell).gradients(dh, dc);
  });
}

void double_backward(at::TensorIteratorBase& iter) {
  elementwise<7, 12>(iter, [](const auto& in) {
    const auto& [vi, vf, vg, vo, vc, dh, dc, i, f, g, o, cell] = in;
    return LstmStep(i, f, g, o, cell).second({vi, vf, vg, vo, vc}, dh, dc);
  });
}

}  // namespace
}  // namespace lstm

const LstmKernels lstm_kernels{lstm::forward, lstm::backward, lstm::double_backward};

}  // namespace gradnorm_kernels::CPU_CAPABILITY
