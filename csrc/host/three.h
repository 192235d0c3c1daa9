// Three registers in place of one. A long formula of one register waits for its own results: three of them interleaved keep
// the processor busy, and load each constant once.
#pragma once

#include "../math.h"

namespace fastvae {
namespace FASTVAE_ISA {

template <class V>
struct Three {
    V a, b, c;

    Three() = default;
    FASTVAE_INLINE Three(V x) : a(x), b(x), c(x) {}  // a constant stands for three
    FASTVAE_INLINE Three(V a, V b, V c) : a(a), b(b), c(c) {}

#define FASTVAE_EACH(RESULT, HEAD, EXPRESSION)                                       \
    friend FASTVAE_INLINE RESULT HEAD {                                              \
        const auto one = [](V x, V y) FASTVAE_LAMBDA { (void)y; return EXPRESSION; };  \
        return {one(x.a, y.a), one(x.b, y.b), one(x.c, y.c)};                        \
    }
    FASTVAE_EACH(Three, operator+(const Three& x, const Three& y), x + y)
    FASTVAE_EACH(Three, operator-(const Three& x, const Three& y), x - y)
    FASTVAE_EACH(Three, operator*(const Three& x, const Three& y), x * y)
    FASTVAE_EACH(Three, operator&(const Three& x, const Three& y), x & y)
    FASTVAE_EACH(Three, operator|(const Three& x, const Three& y), x | y)
    FASTVAE_EACH(Three, at_least(const Three& x, const Three& y), fastvae::FASTVAE_ISA::at_least(x, y))
    FASTVAE_EACH(Three, at_most(const Three& x, const Three& y), fastvae::FASTVAE_ISA::at_most(x, y))
#undef FASTVAE_EACH

#define FASTVAE_EACH(NAME) \
    friend FASTVAE_INLINE Three NAME(const Three& x) {                                                                  \
        return {fastvae::FASTVAE_ISA::NAME(x.a), fastvae::FASTVAE_ISA::NAME(x.b), fastvae::FASTVAE_ISA::NAME(x.c)};     \
    }
    FASTVAE_EACH(absolute)
    FASTVAE_EACH(exp_of_bounded)
    FASTVAE_EACH(reciprocal)
    FASTVAE_EACH(reciprocal_above_one)
    FASTVAE_EACH(log_normal)
#undef FASTVAE_EACH
    friend FASTVAE_INLINE Three operator-(const Three& x) { return {-x.a, -x.b, -x.c}; }
    friend FASTVAE_INLINE Three if_negative(const Three& x, const Three& y, const Three& z) {
        using fastvae::FASTVAE_ISA::if_negative;
        return {if_negative(x.a, y.a, z.a), if_negative(x.b, y.b, z.b), if_negative(x.c, y.c, z.c)};
    }
};

// A register of a pack, or the register itself.
template <class P>
struct register_of {
    using type = P;
};
template <class V>
struct register_of<Three<V>> {
    using type = V;
};
template <class P>
using register_t = typename register_of<P>::type;

// a < b, a where the mask says so, and a mask that is not: for one register and for three.
template <class V>
FASTVAE_INLINE auto less(V a, V b) {
    return a < b;
}
template <class M, class V>
FASTVAE_INLINE V choose(M mask, V a, V b) {
    return mask ? a : b;
}
template <class V>
FASTVAE_INLINE auto less(const Three<V>& a, const Three<V>& b) {
    return Three<decltype(a.a < b.a)>{a.a < b.a, a.b < b.b, a.c < b.c};
}
template <class M, class V>
FASTVAE_INLINE Three<V> choose(const Three<M>& mask, const Three<V>& a, const Three<V>& b) {
    return {mask.a ? a.a : b.a, mask.b ? a.b : b.b, mask.c ? a.c : b.c};
}
template <class M>
FASTVAE_INLINE M both_not(M a, M b) {  // b, where a is not
    return ~a & b;
}
template <class M>
FASTVAE_INLINE Three<M> both_not(const Three<M>& a, const Three<M>& b) {
    return {~a.a & b.a, ~a.b & b.b, ~a.c & b.c};
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
