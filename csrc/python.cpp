// Lets Python import the library under the name that setup.py gives it; the ops register themselves when it
// is loaded.
#include <Python.h>

#define INIT(name) INIT_(name)
#define INIT_(name) PyInit_##name

PyMODINIT_FUNC INIT(TORCH_EXTENSION_NAME)() {
  static PyModuleDef module{PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
