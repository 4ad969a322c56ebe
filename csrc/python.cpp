// Lets Python import the library as gradnorm_kernels._C; the ops register themselves when it is loaded.
#include <Python.h>

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module{PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
