"""The kernel primitives, once per backend: ``reference`` (plain torch), ``numba``, ``triton``, ``compiled``.

``reference`` is the specification; ``compiled`` holds two backends, ``cpp`` and ``cuda``. A backend is one module with
these functions. They take and return plain tensors, know nothing of autograd, and are called with devices, dtypes and
shapes that ``fastvae/functional.py`` has checked:

``latent_forward(mu, scale, seed, prior_mu, prior_logvar, *, log_scale, low, high, samples, free_bits, reduction)``
    → ``[z] + [kl]``: z is there if ``seed`` is given, kl if ``reduction`` is.
``latent_backward(grad_z, grad_kl, mu, scale, seed, prior_mu, prior_logvar, *, …as latent_forward)``
    → ``[grad_mu, grad_scale]``, then ``[grad_prior_mu, grad_prior_logvar]`` if there is a prior.
``reconstruction_forward(recon, target, parameter_tensor=None, zero_logits=None, library=None, *, likelihood, parameter,
reduction, with_gradient)``
    → ``[nll]``, then if ``with_gradient`` the gradients of ``nll`` in ``recon`` and in each tensor there is, for an
    upstream gradient of 1.
``reconstruction_backward(grad_nll, recon, target, parameter_tensor=None, zero_logits=None, library=None, *, likelihood,
parameter, reduction)``
    → ``[grad_recon]``, and a gradient of each tensor there is, computed afresh.
``elbo_forward(recon, target, mu, scale, *, …as reconstruction_forward, log_scale, low, high, beta, free_bits)``
    → ``[loss, nll, kl]``, then the gradient of ``nll`` in ``recon`` if ``with_gradient``; ``loss`` has nll's dtype.
    A backend may add those of β·KL in ``mu`` and ``scale``, where ``layout.keeps_kl_gradients``.
``elbo_backward(gradient, upstream, mu, scale, *, log_scale, low, high, beta, free_bits, reduction)``
    → ``[grad_mu, grad_scale]`` of β·KL, and ``gradient`` as ``rescale_`` leaves it; ``reduction`` is a total.
``rescale_(gradient, upstream)``
    multiplies ``gradient`` in place by the one-element ``upstream``; returns at once where that is 1.
``linear_forward(hidden, weight, bias, target, *, likelihood, parameter, reduction, with_gradient)``
    → what ``reconstruction_forward`` gives of ``F.linear(hidden, weight, bias)``, by example or as a sum; None where
    the library is as good. Not every backend has it.
``aggregate_posterior_forward(z, mu, logvar, *, own, beside, keep)``
    → ``[log_qz, log_prod_qz]`` of a mixture of equal weights, whose logarithm is ``own`` more where the row of mu is
    that of z, ``beside`` more at the next one (cyclic); then if ``keep`` two tensors for the backward
    alone: ``[B]`` in float64 and ``[B, D]`` in the dtype of the arithmetic.
``aggregate_posterior_backward(grad_qz, grad_prod, z, mu, logvar, kept, kept_each, *, own, beside)``
    → ``[grad_z, grad_mu, grad_logvar]``; either upstream gradient may be None, and what is kept too.
``mixture_forward(z, means, logvars, log_weights, *, keep)``, ``mixture_backward(grad, z, …, log_weights, kept)``
    → ``[log_prob]``, and what is kept, ``[B]`` in float64; a gradient of each tensor there is.
``mmd_forward(x, y, *, family, scales, unbiased)``, ``mmd_backward(grad, x, y, *, …, of_y)``
    → ``[MMD²]``; ``[grad_x]``, then grad_y if ``of_y``.

Shapes and values
    ``mu``, ``scale``: ``[B, *latent]``, one dtype. ``scale`` is ``logvar`` if ``log_scale``, else ``std``.
    ``low``, ``high``: logvar is clamped to [low, high] before use, and has no gradient outside, as in ``torch.clamp``;
    -inf and inf for no bound, and beside std.
    ``prior_mu``, ``prior_logvar``: both or neither, as ``mu``. ``seed``: one int64 on the same device.
    ``samples``: 0 for z of the shape of ``mu``, S for ``[S, *mu.shape]``; noise is indexed by the element of z.
    ``recon``, ``target``: ``[B, *data]``; ``target`` is uint8 (meaning x/255), float32 or of the dtype of ``recon``.
    ``reduction``: ``"none"``, ``"example"``, ``"sum"``, ``"mean"``, ``"batchmean"``; for the latent pair ``""``: no KL.
    ``with_gradient`` comes with the last three, the *total* reductions, and on CPUs with ``"example"``.
    ``likelihood``: a key of ``likelihoods.LIKELIHOODS``; ``parameter`` is its one number (eps, var; else 0).
    ``parameter_tensor`` stands in place of the number where the likelihood is one of ``likelihoods.WITH_TENSOR``: of
    any shape that broadcasts to ``recon``. Its gradient has its shape and ``parameters.gradient_dtype``: float64, or
    the dtype of the arithmetic where nothing is summed. The caller rounds it, after the upstream gradient.
    Beside it there may be ``zero_logits``, of the shape of ``recon``, and ``library``, ``[B]``: then ``recon`` are
    scores, float32 or float64, and the mean is library · softmax(scores) over an example.
    Arithmetic is in float64 for float64 inputs, else in float32. Elementwise outputs, z and gradients have the dtype
    of their input; reduced losses are float64 for float64 inputs, else float32. Outputs are contiguous.
    Any layout may come in; ``layout.as_rows`` turns it into rows with a stride. All but ``reference`` get these
    functions from ``work.Primitives``, and only fill the buffers that it lays out.
    Pairs are sums over every row of one tensor with every row of another, all ``[rows, D]`` and not empty; a backend
    without kernels for them takes the reference's functions, which hold some rows at a time.
    On a CPU, a target (or y) outside its likelihood's domain is a ``ValueError``: ``checks.domain_error``.
    On a GPU it is not looked for: that would synchronise.
"""
