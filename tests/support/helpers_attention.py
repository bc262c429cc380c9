"""Cases and gradients for the tests of shared_kv_attention."""

import torch

from ldistill_kernels.testing import error_ratio, make_case, naive_attention, second_segment

DOCUMENTS = [[(0, 7, 3), (7, 9, 9), (18, 4, 1)], [], [(2, 11, 4), (13, 1, 1), (14, 8, 0)]]
RATIOS = [(15, 5), (9, 3), (32, 32), (32, 8), (32, 4), (6, 1)]


def make_variants() -> dict:
    """fp64 cases by name: layouts, the second segment, invisible positions."""
    double = {"seq": 24, "dtype": torch.float64}
    visible = torch.rand(3, 24, generator=torch.Generator().manual_seed(3)) < 0.5
    hidden = torch.zeros(3, 24, dtype=torch.bool)
    plain = make_case(DOCUMENTS, heads=(15, 5), **double)
    some = make_case(DOCUMENTS, heads=(4, 2), visible=visible, **double)
    return {
        "plain": plain,
        "bshd": make_case(DOCUMENTS, heads=(9, 3), layout="bshd", **double),
        "second": second_segment(make_case(DOCUMENTS, heads=(6, 1), **double), every=2),
        "visible": some,
        "visible and second": second_segment(some),
        "nothing": make_case(DOCUMENTS, visible=hidden, **double),
    }


VARIANTS = make_variants()


def gradients(function, case, **options):
    """out, lse (0 where it is -inf) and the gradients of a loss that uses both."""
    case = case.cast(case.q.dtype, requires_grad=True)
    out, lse = function(*case.positional, **case.options, **options)
    lse = lse.masked_fill(lse == -torch.inf, 0.0)
    weight = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)
    loss = (out.to(lse.dtype) * weight).sum() + lse.sin().sum()
    return out.detach(), lse.detach(), *torch.autograd.grad(loss, list(case.floats().values()))


def assert_within_budget(actual, case) -> None:
    """Errors against fp64 stay within 2 (outputs) and 3 (gradients) times plain PyTorch's."""
    exact = gradients(naive_attention, case.cast(torch.float64))
    baseline = gradients(naive_attention, case)
    names = ["out", "lse", *(f"grad of {name}" for name in case.floats())]
    for i, name in enumerate(names):
        assert torch.isfinite(actual[i]).all(), name
        ratio = error_ratio(actual[i], baseline[i], exact[i])
        assert ratio <= (2 if i < 2 else 3), f"{name}: {ratio:.2f} times the error of PyTorch"
