// A reconstruction term whose parameter is a tensor, on a GPU: loss and gradients in one pass over the data.
//
// Beside those of recon and target, it reads 4 bytes an element of a parameter by element (by column, that row stays in the
// cache) and of the logits of a zero, and writes as many of each gradient.
#include "terms.cuh"

namespace fastvae {
namespace device {
namespace {

// What has an address is written; INFLATED: the logits of a zero are read.
template <class TERM, class Y, class X, bool BY_ROW, bool INFLATED>
__global__ void __launch_bounds__(THREADS, BLOCKS<Y>) with_tensor_kernel(const WithTensor work, const int group) {
    using V = compute_t<Y>;
    __shared__ SumStorage storage;
    const Reconstruction& of = work.of;
    for_items(of.grid, group, [&](const Turn& turn) {
        const int64_t begin = turn.row * of.grid.cols, left = of.grid.total - begin;
        const int64_t end = left < of.grid.cols ? left : of.grid.cols;
        const Y* recon = static_cast<const Y*>(of.recon) + turn.row * of.recon_stride;
        const X* target = static_cast<const X*>(of.target) + turn.row * of.target_stride;
        const V* parameter = static_cast<const V*>(work.parameter) + turn.row * work.parameter_stride;
        Y* nll = of.nll == nullptr ? nullptr : static_cast<Y*>(of.nll) + begin;
        Y* grad = of.grad == nullptr ? nullptr : static_cast<Y*>(of.grad) + begin;
        V* grad_parameter = work.grad_parameter == nullptr ? nullptr : static_cast<V*>(work.grad_parameter) + begin;
        const Y* upstream = nullptr;
        V by_row = static_cast<V>(of.weight);
        if (of.upstream_by_element) upstream = static_cast<const Y*>(of.upstream) + turn.row * of.upstream_stride;
        else if (of.upstream != nullptr) by_row *= static_cast<const V*>(of.upstream)[turn.row * of.upstream_stride];
        const int64_t head = head_of<VECTOR<Y>>(recon);
        bool vectors = aligned<VECTOR<Y>>(recon + head) && aligned<VECTOR<Y>>(target + head) &&
                       (BY_ROW || aligned<VECTOR<Y>>(parameter + head));
        if (nll != nullptr) vectors = vectors && aligned<VECTOR<Y>>(nll + head);
        if (grad != nullptr) vectors = vectors && aligned<VECTOR<Y>>(grad + head);
        if (grad_parameter != nullptr) vectors = vectors && aligned<VECTOR<Y>>(grad_parameter + head);
        if (upstream != nullptr) vectors = vectors && aligned<VECTOR<Y>>(upstream + head);
        const V* logits = nullptr;
        V* grad_logits = nullptr;
        if constexpr (INFLATED) {
            logits = static_cast<const V*>(work.zero_logits) + turn.row * work.zero_logits_stride;
            vectors = vectors && aligned<VECTOR<Y>>(logits + head);
            if (work.grad_zero_logits != nullptr) {
                grad_logits = static_cast<V*>(work.grad_zero_logits) + begin;
                vectors = vectors && aligned<VECTOR<Y>>(grad_logits + head);
            }
        }
        double sum = 0, slope_sum = 0;
        for_elements<VECTOR<Y>>(turn, end, head, vectors, [&](auto n, int64_t j) {
            constexpr int N = decltype(n)::value;
            const Values<V, N> y = load<N>(recon + j);
            const Values<V, N> x = load<N>(target + j);
            Values<V, N> p, c, of_nll, of_recon, of_parameter, logit, of_logit;
            if constexpr (!BY_ROW) p = load<N>(parameter + j);
            if constexpr (INFLATED) logit = load<N>(logits + j);
            if (upstream != nullptr) c = load<N>(upstream + j);
            V additive = 0, slopes = 0;
#pragma unroll
            for (int k = 0; k < N; ++k) {
                if constexpr (BY_ROW) p.v[k] = *parameter;
                if (upstream == nullptr) c.v[k] = by_row;
                const Terms<V> terms = TERM::terms(y.v[k], x.v[k], p.v[k]);
                of_nll.v[k] = terms.additive;
                if constexpr (INFLATED) {
                    const ZeroInflated<V> term = zero_inflated(terms.additive, x.v[k], logit.v[k]);
                    of_nll.v[k] = term.nll;
                    of_logit.v[k] = term.by_logit * c.v[k];
                    c.v[k] *= term.by_nll;
                }
                of_recon.v[k] = terms.derivative * c.v[k];
                of_parameter.v[k] = TERM::slope(y.v[k], x.v[k], p.v[k]) * c.v[k];
                additive += of_nll.v[k];
                slopes += of_parameter.v[k];
            }
            sum += static_cast<double>(additive);
            slope_sum += static_cast<double>(slopes);
            if (nll != nullptr) store<N>(nll + j, of_nll);
            if (grad != nullptr) store<N>(grad + j, of_recon);
            if (grad_parameter != nullptr) store<N>(grad_parameter + j, of_parameter);
            if constexpr (INFLATED) {
                if (grad_logits != nullptr) store<N>(grad_logits + j, of_logit);
            }
        });
        if (of.sums != nullptr) write_sum(storage, group, turn, sum, of.sums);
        if (work.parameter_sums != nullptr) write_sum(storage, group, turn, slope_sum, work.parameter_sums);
    });
}

template <class TERM, class Y, class X>
int64_t launch(const WithTensor& work, const Queue& queue) {
    if constexpr (TERM::WITH_TENSOR) {
        const auto rows = [&](auto inflated) {
            constexpr bool INFLATED = decltype(inflated)::value;
            if (work.by_row) {
                return launch_rows<with_tensor_kernel<TERM, Y, X, true, INFLATED>>(work, work.of.grid, VECTOR<Y>, queue);
            }
            return launch_rows<with_tensor_kernel<TERM, Y, X, false, INFLATED>>(work, work.of.grid, VECTOR<Y>, queue);
        };
        if constexpr (TERM::TARGET == Domain::COUNT) {
            if (work.zero_logits != nullptr) return rows(std::true_type{});
        }
        return rows(std::false_type{});
    } else {
        throw std::invalid_argument(std::string(TERM::NAME) + " takes no tensor for its parameter");
    }
}

}  // namespace

int64_t with_tensor(const WithTensor& work, const Queue& queue) {
    const OnDevice guard(queue.device);
    return for_types(work.of, [&](auto term, auto y, auto x) {
        return launch<decltype(term), decltype(y), decltype(x)>(work, queue);
    });
}

}  // namespace device
}  // namespace fastvae
