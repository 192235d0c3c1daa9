// The Python module fastvae._autograd: a plain call of an op, and its node in the graph of autograd, without Python. What is
// not plain comes back as None, and is Python's (fastvae/autograd.py); so is a backward that is not: a node asks it. Only this
// folder knows PyTorch, by the headers of the one it is built for, and serves no other; fastvae._C lends it the kernels.
#include "call.h"

namespace fastvae {
namespace {

// Reads a tuple of options; a Python exception is set where it throws.
class Reader {
  public:
    explicit Reader(PyObject* tuple) : tuple_(tuple), size_(PyTuple_GET_SIZE(tuple)) {}

    double number() {
        const double value = PyFloat_AsDouble(next());
        if (value == -1 && PyErr_Occurred() != nullptr) throw_python_error();
        return value;
    }
    int64_t integer() {
        const int64_t value = PyLong_AsLongLong(next());
        if (value == -1 && PyErr_Occurred() != nullptr) throw_python_error();
        return value;
    }
    bool flag() { return PyObject_IsTrue(next()) == 1; }
    int likelihood() {
        PyObject* code = PyDict_GetItemWithError(codes, next());
        return code == nullptr ? -1 : static_cast<int>(PyLong_AsLong(code));
    }
    Reduction reduction() {
        constexpr const char* NAMES[] = {"", "none", "example", "sum", "mean", "batchmean"};
        PyObject* name = next();
        for (int k = 0; k < 6; ++k) {
            if (PyUnicode_CompareWithASCIIString(name, NAMES[k]) == 0) return static_cast<Reduction>(k - 1);
        }
        throw std::invalid_argument("no such reduction");
    }

  private:
    PyObject* next() {
        if (at_ == size_) throw std::invalid_argument("too few options");
        return PyTuple_GET_ITEM(tuple_, at_++);
    }

    PyObject* tuple_;
    Py_ssize_t size_, at_ = 0;
};

Options options_of(Op op, PyObject* tuple) {
    Options options;
    Reader read(tuple);
    if (op != LATENT) {
        options.likelihood = read.likelihood();
        options.parameter = read.number();
    }
    if (op != RECONSTRUCTION) {
        options.log_scale = read.flag();
        options.low = read.number();
        options.high = read.number();
        if (op == LATENT) options.samples = read.integer();
        if (op == ELBO_LOSS) options.beta = read.number();
        options.free_bits = read.number();
    }
    options.reduction = read.reduction();
    if (op != LATENT) options.with_gradient = read.flag();
    return options;
}

// call(op, kernels, context, tensors, options): the outputs for the caller, or None for what is not plain.
PyObject* call(PyObject*, PyObject* const* args, Py_ssize_t count) {
    HANDLE_TH_ERRORS
    TORCH_CHECK_TYPE(count == 5 && PyTuple_Check(args[3]) && PyTuple_Check(args[4]),
                     "call takes an op, its kernels, a context, and tuples of tensors and of options");
    if (listened_to()) Py_RETURN_NONE;
    const auto* kernels = static_cast<const Kernels*>(PyCapsule_GetPointer(args[1], KERNELS_CAPSULE));
    if (kernels == nullptr) return nullptr;
    const auto op = static_cast<Op>(PyLong_AsLong(args[0]));
    Call call{op, *kernels, options_of(op, args[4]), {}, {}, {}};
    for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(args[3]); ++k) {
        PyObject* item = PyTuple_GET_ITEM(args[3], k);
        if (item != Py_None && !THPVariable_CheckExact(item)) Py_RETURN_NONE;
        call.tensors.push_back(item == Py_None ? Tensor() : THPVariable_Unpack(item));
    }
    if (!call.run()) Py_RETURN_NONE;
    record(call, args[2], args[4]);
    return wrapped(call.losses);
    END_HANDLE_TH_ERRORS
}

// connect(codes, backward, stream_of): before the first call.
PyObject* connect(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (count != 3 || !PyDict_Check(args[0])) {
        PyErr_SetString(PyExc_TypeError, "connect takes a dict and two functions");
        return nullptr;
    }
    Py_XSETREF(codes, Py_NewRef(args[0]));
    Py_XSETREF(backward, Py_NewRef(args[1]));
    Py_XSETREF(stream_of, Py_NewRef(args[2]));
    Py_RETURN_NONE;
}

// An extension that was built with the headers of another torch would read its memory wrongly.
bool same_torch() {
    THPObjectPtr torch(PyImport_ImportModule("torch"));
    if (!torch) return false;
    THPObjectPtr version(PyObject_GetAttrString(torch.get(), "__version__"));
    if (!version) return false;
    THPObjectPtr name(PyObject_Str(version.get()));
    if (!name) return false;
    if (PyUnicode_CompareWithASCIIString(name.get(), FASTVAE_TORCH) == 0) return true;
    PyErr_Format(PyExc_ImportError, "built for torch %s, this is torch %U", FASTVAE_TORCH, name.get());
    return false;
}

// METH_FASTCALL has a type of its own, which the table knows by a cast only.
template <class F>
PyCFunction fast(F function) {
    return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef methods[] = {
    {"call", fast(call), METH_FASTCALL, nullptr},
    {"connect", fast(connect), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef definition{PyModuleDef_HEAD_INIT, "_autograd", "Plain calls of ops; see fastvae/autograd.py.", -1, methods};

}  // namespace
}  // namespace fastvae

PyMODINIT_FUNC PyInit__autograd() {
    return fastvae::same_torch() ? PyModule_Create(&fastvae::definition) : nullptr;
}
