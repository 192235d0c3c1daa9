// The interpreter, as the other files of this folder need it: its lock, its errors, its tensors, and Python's own backward.
#pragma once

#include <Python.h>

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>

#include <vector>

#include "../kernels.h"

namespace fastvae {
namespace {

using at::Tensor;
using torch::autograd::variable_list;

// What fastvae/autograd.py hands over once, by `connect`.
PyObject* codes = nullptr;      // of the likelihoods, by name
PyObject* backward = nullptr;   // a backward that is not plain
PyObject* stream_of = nullptr;  // the current stream of a CUDA device, as an int

// The error that Python has set, for whatever thread it ends in.
[[noreturn]] void throw_python_error() {
    python_error error;
    error.persist();
    throw error;
}

class GIL {
  public:
    GIL() : state_(PyGILState_Ensure()) {}
    ~GIL() { PyGILState_Release(state_); }
    GIL(const GIL&) = delete;
    GIL& operator=(const GIL&) = delete;

  private:
    PyGILState_STATE state_;
};

// Runs f, without the interpreter's lock where that is held and other threads would wait long.
template <class F>
auto unlocked(int64_t elements, F f) {
    struct Release {
        explicit Release(bool release) : state(release ? PyEval_SaveThread() : nullptr) {}
        ~Release() {
            if (state != nullptr) PyEval_RestoreThread(state);
        }
        PyThreadState* state;
    } const release(elements >= LONG);
    return f();
}

// What Python wants to be told when it is asked, and the options as they came.
struct Asked {
    Asked(PyObject* context, PyObject* options) : context(Py_NewRef(context)), options(Py_NewRef(options)) {}
    Asked(const Asked&) = delete;
    Asked& operator=(const Asked&) = delete;
    ~Asked() {
        if (Py_IsInitialized() == 0) return;
        const GIL gil;
        Py_DECREF(context);
        Py_DECREF(options);
    }

    PyObject *context, *options;
};

// A new tuple, with None for what is undefined.
PyObject* wrapped(const variable_list& tensors) {
    THPObjectPtr tuple(PyTuple_New(static_cast<Py_ssize_t>(tensors.size())));
    if (!tuple) throw_python_error();
    for (size_t k = 0; k < tensors.size(); ++k) {
        PyObject* item = THPVariable_Wrap(tensors[k]);
        if (item == nullptr) throw_python_error();
        PyTuple_SET_ITEM(tuple.get(), k, item);
    }
    return tuple.release();
}

variable_list unwrapped(PyObject* tuple) {
    variable_list tensors(PyTuple_GET_SIZE(tuple));
    for (size_t k = 0; k < tensors.size(); ++k) {
        PyObject* item = PyTuple_GET_ITEM(tuple, k);
        if (item != Py_None) tensors[k] = THPVariable_Unpack(item);
    }
    return tensors;
}

// The gradients by fastvae/autograd.py; afterwards `kept` are those that it left.
variable_list in_python(const Asked& asked, const std::vector<bool>& needed, const variable_list& inputs,
                        variable_list& kept, const variable_list& grads) {
    const GIL gil;
    THPObjectPtr flags(PyTuple_New(static_cast<Py_ssize_t>(needed.size())));
    if (!flags) throw_python_error();
    for (size_t k = 0; k < needed.size(); ++k) PyTuple_SET_ITEM(flags.get(), k, PyBool_FromLong(needed[k]));
    THPObjectPtr of_inputs(wrapped(inputs)), of_kept(wrapped(kept)), of_grads(wrapped(grads));
    THPObjectPtr answer(PyObject_CallFunctionObjArgs(backward, asked.context, asked.options, flags.get(), of_inputs.get(),
                                                     of_kept.get(), of_grads.get(), nullptr));
    if (!answer) throw_python_error();
    kept = unwrapped(PyTuple_GET_ITEM(answer.get(), 1));
    return unwrapped(PyTuple_GET_ITEM(answer.get(), 0));
}

}  // namespace
}  // namespace fastvae
