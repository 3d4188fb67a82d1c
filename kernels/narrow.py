"""Many pairs of few features (D <= 128): each gradient in one pass, and nothing of M x N in memory.

A program holds a tile of rows with their gradient and goes over the other side as flash attention does: it
forms logits, loss and derivatives and adds the derivatives' product with the same other rows. For NCE the
weight of a pair is known beforehand, so this is all: 4 MND operations a side. InfoNCE first needs its
log-sum-exps, 2 MND more. The other side's gradient is the same pass with the roles exchanged, which forms the
logits again (8 MND for both): the price of no workspace and no atomics. Where there are too few tiles of rows
for the device, the other side is split, and the parts are added in their order.
"""

from collections.abc import Sequence

import triton
from torch import Tensor

from mim4dd.losses.form import LossForm

from . import sides
from .launch import choose, device_limits, dot_precision, precision_of
from .narrow_kernels import narrow_kernel

WIDEST = 128


def contrast(
    form: LossForm,
    scales: Tensor,
    anchor_labels: Tensor,
    key_labels: Tensor,
    anchors: Tensor,
    keys: Tensor,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """One layer's loss [1] and gradients for scales [2, 1], anchors and keys (empty where not wanted).

    Features are contiguous, aligned, of a width that is a multiple of 16 up to WIDEST; other arguments as in
    `kernels.contrast`.
    """
    want_scales, *want_sides = wanted
    a, k, largest, loss = sides.prepare(form, scales, anchor_labels, key_labels, anchors, keys)
    if loss is not None and not any(wanted):
        return [loss, *[loss.new_empty(0)] * 3]
    pair = a, k
    width, device = anchors.shape[1], anchors.device
    precision = precision_of(anchors.dtype)

    def one_pass(index: int, summing: bool) -> tuple[Tensor, Tensor]:
        """The sums, if `summing`, and the gradient of side `index`, if wanted."""
        own, others, gradient = pair[index], pair[1 - index], want_sides[index]
        num_own, num_others = len(own.features), len(others.features)
        tile = choose(
            table_name(form, wanted, width),
            anchors,
            lambda t: triton.cdiv(num_own, t.m) * triton.cdiv(num_others, t.n),
        )
        tiles = triton.cdiv(num_own, tile.m)
        steps = _steps(tiles, triton.cdiv(num_others, tile.n), 2 * device_limits(device)[1])
        num_parts = triton.cdiv(num_others, steps * tile.n)
        gain = sides.gain(anchors.dtype, largest * others.inverse.amax())
        parts = scales.new_empty(num_parts, num_own, width if gradient else 0)
        sums = scales.new_zeros(num_parts * tiles, 3)
        narrow_kernel[(tiles, num_parts)](
            own.features, others.features, own.inverse, others.inverse, own.labels, others.labels,
            own.on_positive, own.on_other, own.lse2, own.pull2,
            others.on_positive, others.on_other, others.lse2, others.pull2,
            scales, gain, parts, sums, num_own, num_others, steps * tile.n,
            WIDTH=width, LOSS=form.name,
            BY_OWN=form.symmetric or index == 0, BY_OTHER=form.symmetric or index == 1,
            EXCLUDE_SELF=form.exclude_self,
            SUM=summing and loss is None, BY_SCALES=summing and want_scales, GRADIENT=gradient,
            PRECISION=dot_precision(precision), BLOCK_M=tile.m, BLOCK_N=tile.n,
            BLOCK_D=triton.next_power_of_2(width), num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return sums.sum(0), sides.feature_gradient(parts, own, scales, gain) if gradient else parts[0]

    # The first pass also makes the loss and the gradients by the scales.
    first, *more = [index for index in (0, 1) if want_sides[index]] or [0]
    sums, grad_first = one_pass(first, True)
    grad_side = {0: anchors.new_empty(0), 1: anchors.new_empty(0), first: grad_first}
    for index in more:
        _, grad_side[index] = one_pass(index, False)
    loss = sums[:1] if loss is None else loss
    return [loss, sides.scale_gradient(sums, scales), grad_side[0], grad_side[1]]


def table_name(form: LossForm, wanted: Sequence[bool], width: int) -> str:
    """The launch table of a call."""
    if width <= 64:
        return "NARROW_64"
    return "LONG_NARROW_128" if form.symmetric or wanted[0] else "NARROW_128"


def _steps(tiles: int, steps: int, slots: int) -> int:
    """How many tiles of the other side a program goes over, of `steps` in all.

    Programs run in waves of `slots`; a program takes as long as its steps and about two more to begin and to
    end. The fewest parts win whose total is about the least, for each is a gradient in memory.
    """

    def total(n: int) -> int:
        return triton.cdiv(tiles * triton.cdiv(steps, n), slots) * (n + 2)

    most = min(steps, max(8, triton.cdiv(slots, tiles)))
    lengths = [triton.cdiv(steps, parts) for parts in range(1, most + 1)]
    least = min(map(total, lengths))
    return next(n for n in lengths if total(n) <= 1.05 * least)
