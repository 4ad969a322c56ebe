#!/usr/bin/env bash
# torch 2.13.0, CPU; torch 2.14.1 is no different. Needs g++.
#
# The wheel has the headers of torch.func (ATen/functorch), whose functions are exported, and documents how C++
# extensions are built. But ATen/functorch/Interpreter.h, which nearly all of them include, includes nlohmann/json.hpp,
# which the wheel lacks. An extension cannot ask which transform is running, or use the helpers of batching rules,
# unless it brings that library; its own dispatch keys and tensors tell it less.
#
# Seen: DynamicLayer.h: fatal error: nlohmann/json.hpp: No such file or directory
#       BatchRulesHelper.h: fatal error: nlohmann/json.hpp: No such file or directory
#       TensorWrapper.h: fatal error: nlohmann/json.hpp: No such file or directory
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy setuptools
"$folder/venv/bin/python" - <<'PYTHON'
import os
import subprocess

from torch.utils.cpp_extension import include_paths

for header in ("DynamicLayer.h", "BatchRulesHelper.h", "TensorWrapper.h"):
    paths = include_paths()
    assert any(os.path.exists(f"{path}/ATen/functorch/{header}") for path in paths)
    command = ["g++", "-std=c++20", "-fsyntax-only", "-x", "c++", "-", *(f"-I{path}" for path in paths)]
    source = f"#include <ATen/functorch/{header}>\n"
    done = subprocess.run(command, input=source, capture_output=True, text=True)
    (error,) = [line for line in done.stderr.splitlines() if "fatal error" in line]
    print(f"{header}: {error[error.index('fatal error'):]}")
    assert "nlohmann/json.hpp: No such file" in error
PYTHON
