"""The lecture's `fit_polynomial` (page 48), after our notes of it, and without its loop over the points.

`torch.gels(b, A)` is gone; `torch.linalg.lstsq(A, b)` takes the arguments in the other order, and returns the solution
without further rows. Run it with `python examples/fit_polynomial.py`.
"""

import torch


def fit_polynomial_with_loops(degree: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Returns the coefficients of least squares: both loops written out, as in the lecture."""
    matrix = torch.empty(len(x), degree + 1, dtype=x.dtype)
    for n in range(len(x)):
        for d in range(degree + 1):
            matrix[n, d] = x[n] ** d
    return torch.linalg.lstsq(matrix, y[:, None]).solution[:, 0]


def fit_polynomial(degree: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Returns the same without a loop: the exercise of page 48."""
    return torch.linalg.lstsq(x[:, None] ** torch.arange(degree + 1), y[:, None]).solution[:, 0]


if __name__ == "__main__":
    torch.manual_seed(0)
    x = torch.rand(14, dtype=torch.float64)
    y = 1 - 2 * x + 3 * x**2
    for fit in (fit_polynomial_with_loops, fit_polynomial):
        print(", ".join(f"{coefficient:.6f}" for coefficient in fit(2, x, y).tolist()))
