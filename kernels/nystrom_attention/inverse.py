"""The iterative pseudo-inverse of Nyström attention (arXiv 2102.03902, Lemma 1), with its gradient.

The number of steps belongs to the model: directions of the matrix that are small are damped rather than inverted, and
a more exact inverse makes a worse attention. It is no setting of accuracy.
"""

import torch

# init -> the dimensions of [K, N, N] over which its largest column sum is taken
_SCOPES = {"exact": (-2, -1), "original": (0, 1, 2)}
INITS = tuple(_SCOPES)


def pseudo_inverse(matrix: torch.Tensor, *, iterations: int = 6, init: str = "exact") -> torch.Tensor:
    """Approximate pseudo-inverses of matrices [K, N, N] of attention weights, whose rows sum to 1 or are zero.

    Z <- Z (13 - A Z (15 - A Z (7 - A Z))) / 4, from Z = A^T / c. With init "exact" c is each matrix's largest column
    sum; with "original", as released, the largest of all K, so that they depend on each other. Differentiable, through
    c too.
    """
    inverse, fifteen = start(matrix, init), _fifteen(matrix)
    for _ in range(iterations):
        inverse = _step(inverse, _products(matrix, inverse, fifteen)[2])
    return inverse


def pseudo_inverse_grad(
    matrix: torch.Tensor, grad: torch.Tensor, *, iterations: int = 6, init: str = "exact"
) -> torch.Tensor:
    """Gradient of the matrices, given that of their pseudo-inverses, without autograd: the steps are computed again."""
    inverses, fifteen = [start(matrix, init)], _fifteen(matrix)
    for _ in range(iterations - 1):
        inverses.append(_step(inverses[-1], _products(matrix, inverses[-1], fifteen)[2]))
    matrix_grad = torch.zeros_like(matrix)
    for inverse in reversed(inverses):
        product, inner, outer = _products(matrix, inverse, fifteen)
        # of -4 times each of the three, the factor of `outer` in a step
        outer_grad = inverse.mT @ grad
        inner_grad = product.mT @ outer_grad
        product_grad = torch.baddbmm(inner_grad, outer_grad, inner.mT, beta=-7.0)
        product_grad = torch.baddbmm(product_grad, inner_grad, product.mT)
        product_grad = torch.baddbmm(product_grad, product.mT, inner_grad)
        grad = torch.baddbmm(grad, grad, outer.mT, beta=3.25, alpha=-0.25)
        grad = torch.baddbmm(grad, matrix.mT, product_grad, alpha=-0.25)
        matrix_grad = torch.baddbmm(matrix_grad, product_grad, inverse.mT, alpha=-0.25)
    return matrix_grad + start_grad(matrix, init, grad)


def _fifteen(matrix):
    return 15.0 * torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)


def _products(matrix, inverse, fifteen):
    """(A Z, 15 - 7 A Z + (A Z)^2, the product of the two)."""
    product = matrix @ inverse
    inner = torch.baddbmm(torch.add(fifteen, product, alpha=-7.0), product, product)
    return product, inner, product @ inner


def _step(inverse, outer):
    return torch.baddbmm(inverse, inverse, outer, beta=3.25, alpha=-0.25)


def start(matrix: torch.Tensor, init: str) -> torch.Tensor:
    """What the iteration begins with, [K, N, N]; zero for a matrix of zeros."""
    return matrix.mT * _factor(matrix.sum(dim=-2, keepdim=True).amax(dim=_SCOPES[init], keepdim=True))


def start_grad(matrix: torch.Tensor, init: str, grad: torch.Tensor) -> torch.Tensor:
    """Gradient of the matrices, given that of `start`; columns that tie for the largest sum share it."""
    scope = _SCOPES[init]
    sums = matrix.sum(dim=-2, keepdim=True)  # [K, 1, N]
    largest = sums.amax(dim=scope, keepdim=True)
    factor = _factor(largest)
    largest_grad = -(factor**2) * (grad * matrix.mT).sum(dim=scope, keepdim=True)
    ties = (sums == largest).to(matrix.dtype)
    return grad.mT * factor + largest_grad * ties / ties.sum(dim=scope, keepdim=True)


def _factor(largest):
    """1 / c; 0 where c is, which only a matrix of zeros has."""
    return torch.where(largest > 0, 1.0 / largest.clamp(min=torch.finfo(largest.dtype).tiny), 0.0)
