"""What Numba lacks for kernels at full vector width: 32-bit integer arithmetic, raw memory, half-precision loads.

Numba widens ``int32 + int32`` to int64, which halves the vector; here it stays 32-bit. Memory is addressed by the
integer a tensor's ``data_ptr()`` gives, and a dtype is a small integer known at compile time, so one source serves
them all and bfloat16 and float16 are converted in registers.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

I16, I32, I64, F16, F32, F64 = (
    ir.IntType(16),
    ir.IntType(32),
    ir.IntType(64),
    ir.HalfType(),
    ir.FloatType(),
    ir.DoubleType(),
)

FLOAT64, FLOAT32, BFLOAT16, FLOAT16, UINT8 = range(5)
ONE_255TH_HIGH, ONE_255TH_LOW = 0x101 * 2.0**-16, 0x1010102 * 2.0**-48


def inlined(function):
    """``overload`` by literal arguments, inlined by force: one call left in a loop and it is not vectorised."""
    return overload(function, prefer_literal=True, jit_options={"forceinline": True})


def _function(result, arguments, emit):
    """An intrinsic ``arguments → result`` whose body is ``emit(builder, *values)``."""
    parameters = ", ".join(f"a{i}" for i in range(len(arguments)))
    scope = {"result": result, "arguments": arguments, "emit": emit}
    exec(
        f"def function(context, {parameters}):\n"
        f"    return result(*arguments), lambda ctx, builder, signature, args: emit(builder, *args)",
        scope,
    )
    return intrinsic(scope["function"])


i32, i64, u32, f32, f64 = types.int32, types.int64, types.uint32, types.float32, types.float64

bits = _function(i32, (f32,), lambda b, x: b.bitcast(x, I32))
from_bits = _function(f32, (i32,), lambda b, x: b.bitcast(x, F32))
to_float = _function(f32, (i32,), lambda b, x: b.sitofp(x, F32))
to_float_unsigned = _function(f32, (u32,), lambda b, x: b.uitofp(x, F32))
as_signed = _function(i32, (u32,), lambda b, x: x)
add = _function(i32, (i32, i32), lambda b, x, y: b.add(x, y))
subtract = _function(i32, (i32, i32), lambda b, x, y: b.sub(x, y))
bit_and = _function(i32, (i32, i32), lambda b, x, y: b.and_(x, y))
shift_left = _function(i32, (i32, i32), lambda b, x, n: b.shl(x, n))
shift_right = _function(i32, (i32, i32), lambda b, x, n: b.ashr(x, n))
add_unsigned = _function(u32, (u32, u32), lambda b, x, y: b.add(x, y))
exclusive_or = _function(u32, (u32, u32), lambda b, x, y: b.xor(x, y))
truncate = _function(u32, (i64,), lambda b, x: b.trunc(x, I32))


def _multiply_high(b, x, y):
    return b.trunc(b.lshr(b.mul(b.zext(x, I64), b.zext(y, I64)), ir.Constant(I64, 32)), I32)


multiply_high = _function(u32, (u32, u32), _multiply_high)
multiply_low = _function(u32, (u32, u32), lambda b, x, y: b.mul(x, y))


def _watch(outside):
    """``(flag, x) → flag | outside(x)``; ``outside`` gets a builder, a value and what makes constants of its type."""

    @intrinsic
    def watch(context, flag, x):
        def emit(ctx, b, signature, args):
            value = args[1]
            found = outside(b, value, lambda number: ir.Constant(value.type, number))
            return args[0] if found is None else b.or_(args[0], b.zext(found, I32))

        return i32(i32, x), emit

    return watch


def _no_count(b, x, constant):
    """Below 0, or with a fraction; from 2²³ on there is none. What fits no integer must not be converted."""
    zero = constant(0.0)
    fits = b.and_(b.fcmp_ordered(">=", x, zero), b.fcmp_ordered("<", x, constant(8388608.0)))
    x_or_zero = b.select(fits, x, zero)
    rounded = b.sitofp(b.fptosi(x_or_zero, I32), x.type)
    return b.or_(b.fcmp_ordered("<", x, zero), b.fcmp_ordered("!=", rounded, x_or_zero))


#: NaN is nowhere outside
everything = _watch(lambda b, x, constant: None)
outside_unit = _watch(
    lambda b, x, constant: b.or_(b.fcmp_ordered("<", x, constant(0.0)), b.fcmp_ordered(">", x, constant(1.0)))
)
negative = _watch(lambda b, x, constant: b.fcmp_ordered("<", x, constant(0.0)))
no_count = _watch(_no_count)


def _pointer(b, address, index, element):
    return b.gep(b.inttoptr(address, element.as_pointer()), [index])


def _load_plain(element, align):
    def emit(b, address, index):
        value = b.load(_pointer(b, address, index, element), typ=element)
        value.align = align
        return value

    return emit


def _store_plain(element, align):
    def emit(b, address, index, value):
        b.store(value, _pointer(b, address, index, element), align=align)
        return ir.Constant(I32, 0)

    return emit


def _load_bfloat16(b, address, index):
    word = b.zext(_load_plain(I16, 2)(b, address, index), I32)
    return b.bitcast(b.shl(word, ir.Constant(I32, 16)), F32)


def _store_bfloat16(b, address, index, value):
    """Round to nearest even; a NaN stays one."""
    word = b.bitcast(value, I32)
    odd = b.and_(b.lshr(word, ir.Constant(I32, 16)), ir.Constant(I32, 1))
    rounded = b.add(word, b.add(odd, ir.Constant(I32, 0x7FFF)))
    quiet = b.or_(word, ir.Constant(I32, 0x400000))
    chosen = b.select(b.fcmp_unordered("uno", value, value), quiet, rounded)
    return _store_plain(I16, 2)(b, address, index, b.trunc(b.lshr(chosen, ir.Constant(I32, 16)), I16))


def _load_float16(b, address, index):
    return b.fpext(_load_plain(F16, 2)(b, address, index), F32)


def _store_float16(b, address, index, value):
    return _store_plain(F16, 2)(b, address, index, b.fptrunc(value, F16))


def _load_uint8(b, address, index):
    """x/255 to nearest, fused or not: HIGH has so few bits that x·HIGH is exact."""
    value = b.sitofp(b.zext(_load_plain(ir.IntType(8), 1)(b, address, index), I32), F32)
    high = b.fmul(value, ir.Constant(F32, ONE_255TH_HIGH), flags=("contract",))
    low = b.fmul(value, ir.Constant(F32, ONE_255TH_LOW), flags=("contract",))
    return b.fadd(high, low, flags=("contract",))


_LOADS = {
    FLOAT64: _function(f64, (i64, i64), _load_plain(F64, 8)),
    FLOAT32: _function(f32, (i64, i64), _load_plain(F32, 4)),
    BFLOAT16: _function(f32, (i64, i64), _load_bfloat16),
    FLOAT16: _function(f32, (i64, i64), _load_float16),
    UINT8: _function(f32, (i64, i64), _load_uint8),
}
_STORES = {
    FLOAT64: _function(i32, (i64, i64, f64), _store_plain(F64, 8)),
    FLOAT32: _function(i32, (i64, i64, f32), _store_plain(F32, 4)),
    BFLOAT16: _function(i32, (i64, i64, f32), _store_bfloat16),
    FLOAT16: _function(i32, (i64, i64, f32), _store_float16),
}
_load_uint8_as_float64 = _function(
    f64,
    (i64, i64),
    lambda b, address, index: b.fdiv(
        b.uitofp(_load_plain(ir.IntType(8), 1)(b, address, index), F64), ir.Constant(F64, 255.0)
    ),
)


@intrinsic
def select(context, condition, a, b):
    """``a if condition else b`` of two floats as one instruction, not a branch: a branch stops the vectoriser."""
    return a(types.boolean, a, a), lambda ctx, builder, signature, args: builder.select(*args)


@intrinsic
def select_nonzero(context, condition, a, b):
    """The same for an int32 condition."""

    def emit(ctx, builder, signature, args):
        return builder.select(builder.icmp_signed("!=", args[0], ir.Constant(I32, 0)), args[1], args[2])

    return a(types.int32, a, a), emit


def load(dtype, address, index):
    """Element ``index`` of the array of ``dtype`` at ``address``, as float32 (float64 for FLOAT64)."""
    raise NotImplementedError("only inside compiled code")


def load_like(dtype, address, index, like):
    """The same in the type of ``like``."""
    raise NotImplementedError("only inside compiled code")


def store(dtype, address, index, value):
    """Round ``value`` to ``dtype`` and write it."""
    raise NotImplementedError("only inside compiled code")


def constant(value, like):
    """``value`` in the type of ``like``: a bare Python float would widen float32 arithmetic to float64."""
    raise NotImplementedError("only inside compiled code")


@inlined(load)
def _load(dtype, address, index):
    emit = _LOADS[dtype.literal_value]
    return lambda dtype, address, index: emit(address, index)


@inlined(load_like)
def _load_like(dtype, address, index, like):
    if like == f64 and dtype.literal_value == UINT8:
        return lambda dtype, address, index, like: _load_uint8_as_float64(address, index)
    emit = _LOADS[dtype.literal_value]
    if like == f64:
        return lambda dtype, address, index, like: f64(emit(address, index))
    return lambda dtype, address, index, like: f32(emit(address, index))


@inlined(store)
def _store(dtype, address, index, value):
    emit = _STORES[dtype.literal_value]
    if dtype.literal_value == FLOAT64:
        return lambda dtype, address, index, value: emit(address, index, f64(value))
    return lambda dtype, address, index, value: emit(address, index, f32(value))


@inlined(constant)
def _constant(value, like):
    return (lambda value, like: f64(value)) if like == f64 else (lambda value, like: f32(value))
