"""The MIM4DD term: maximise the mutual information between real and synthetic feature maps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..losses import calibrated_noise_ratio, info_nce_losses, nce_losses
from ..losses.calibration import Calibrated
from ..losses.checks import FEATURE_DTYPES, LABEL_DTYPES, check_positive, check_tensor


class MutualInformation(Calibrated):
    """A contrastive loss over feature maps, an add-on to any objective (MIM4DD, NeurIPS 2023).

    Same-label pairs, one real and one synthetic, are positive. With `loss="nce"`, the published term, a
    critic judges every pair, synthetic features being the anchors (`mim4dd.nce_loss`); that pulls a synthetic
    image to every real one of its class, and so to the other synthetic ones of it. With `loss="info_nce"`
    every real image must find its class among the synthetic ones, any of which will do
    (`mim4dd.info_nce_loss`, positives="any", real features being the anchors). For C equally frequent
    classes log C minus that loss is a lower bound, in nats, of the information between a real image and a
    synthetic one of its class (Barber and Agakov, NeurIPS 2003): the two have only the label in common, and
    the loss is the cross entropy of a guess at it.

    Layer k of K counts with weight * layer_decay ** (K - 1 - k), so that deeper layers weigh more if
    layer_decay < 1.

    Args:
        loss: "nce" or "info_nce".
        weight: the factor of the whole term, finite.
        layers: "all", "last", or the indices of the maps to compare (negative ones count from the end).
        layer_decay: the factor from a layer to the one before it, finite.
        temperature: of the critic; an `nn.Parameter` is learned.
        noise_ratio: of the critic of "nce", likewise, or "calibrated": measured per layer on the first batch,
            then frozen in the buffer `noise_ratios`, float [layers], which is empty until then.
        negatives: of "nce": negatives drawn per positive; None: as many as there are.
        projection: "none", or a linear map of every layer into a common space: "random" (fixed) or "trained"
            (its parameters are the module's; give them to an optimiser).
        projection_size: width of that space.
        feature_sizes: features per image of every map, compared or not; needed for a projection.
        generator: draws the projection; needed for one.
        symmetric: add the term with the roles of real and synthetic exchanged.

    Raises:
        ValueError: an unknown option, one that the loss does not have, a factor that is not finite, a
            temperature or noise ratio that is not positive, or a projection without its sizes and generator.
    """

    def __init__(
        self,
        *,
        loss: str = "nce",
        weight: float = 1.0,
        layers: str | Sequence[int] = "last",
        layer_decay: float = 1.0,
        temperature: float | Tensor = 0.1,
        noise_ratio: float | Tensor | Literal["calibrated"] = "calibrated",
        negatives: float | None = None,
        projection: str = "none",
        projection_size: int = 128,
        feature_sizes: Sequence[int] = (),
        generator: torch.Generator | None = None,
        symmetric: bool = False,
    ) -> None:
        super().__init__()
        if loss not in ("nce", "info_nce"):
            raise ValueError(f"mim4dd.MutualInformation: loss is {loss!r}, expected 'nce' or 'info_nce'")
        if isinstance(noise_ratio, str) and noise_ratio != "calibrated":
            raise ValueError(
                f"mim4dd.MutualInformation: noise_ratio is {noise_ratio!r}, expected a number or 'calibrated'"
            )
        if loss == "info_nce" and (negatives is not None or noise_ratio != "calibrated"):
            name, value = ("noise_ratio", noise_ratio) if negatives is None else ("negatives", negatives)
            raise ValueError(
                f"mim4dd.MutualInformation: {name} is {value}, but loss is {loss!r}; leave it out, or use "
                "loss='nce', which has it"
            )
        if projection not in ("none", "random", "trained"):
            raise ValueError(
                f"mim4dd.MutualInformation: projection is {projection!r}, expected none, random or trained"
            )
        factors: dict[str, Any] = {"weight": weight, "layer_decay": layer_decay}
        for name, factor in factors.items():
            if not isinstance(factor, Real) or not math.isfinite(factor):
                raise ValueError(f"mim4dd.MutualInformation: {name} is {factor!r}, expected a finite number")
        check_positive("MutualInformation", "temperature", temperature, torch.float64)
        if not isinstance(noise_ratio, str):
            check_positive("MutualInformation", "noise_ratio", noise_ratio, torch.float64)
        self.loss = loss
        self.weight = weight
        self.layers = layers
        self.layer_decay = layer_decay
        self.temperature = temperature
        self.noise_ratio = noise_ratio
        self.negatives = negatives
        self.symmetric = symmetric
        self.noise_ratios: Tensor
        if loss == "nce" and noise_ratio == "calibrated":
            self.register_calibration("noise_ratios")
        self.feature_sizes = tuple(feature_sizes)
        self.projections = nn.ParameterDict()
        if projection != "none":
            if generator is None or not feature_sizes:
                raise ValueError(
                    f"mim4dd.MutualInformation: projection={projection!r} needs feature_sizes and a generator"
                )
            for k in layer_indices(layers, len(feature_sizes)):
                shape = (feature_sizes[k], projection_size)
                matrix = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32)
                self.projections[str(k)] = nn.Parameter(
                    matrix / projection_size**0.5, requires_grad=projection == "trained"
                )

    def forward(
        self,
        synthetic_features: Sequence[Tensor] | Tensor,
        real_features: Sequence[Tensor] | Tensor,
        synthetic_labels: Tensor,
        real_labels: Tensor,
    ) -> Tensor:
        """Return the weighted term, a scalar.

        Args:
            synthetic_features: one map [M, ...] per layer, or a single one.
            real_features: maps [N, ...] likewise.
            synthetic_labels: int32 or int64 [M].
            real_labels: int32 or int64 [N].

        Raises:
            ValueError: maps, labels or layers do not fit, or a map to compare is empty.
        """
        synthetic = [synthetic_features] if isinstance(synthetic_features, Tensor) else synthetic_features
        real = [real_features] if isinstance(real_features, Tensor) else real_features
        if len(synthetic) != len(real):
            raise ValueError(
                f"mim4dd.MutualInformation: {len(synthetic)} synthetic maps, but {len(real)} real ones"
            )
        if self.projections and len(synthetic) != len(self.feature_sizes):
            # A map without a matrix would be compared as it is, and "last" might mean another one.
            raise ValueError(
                f"mim4dd.MutualInformation: there are {len(synthetic)} maps, but feature_sizes has "
                f"{len(self.feature_sizes)}; expected one size for every map"
            )
        layers = layer_indices(self.layers, len(synthetic))
        if not layers:
            raise ValueError("mim4dd.MutualInformation: there is no map to compare, expected at least one")
        for k in layers:
            self._check_map("synthetic", k, synthetic[k], synthetic_labels)
            self._check_map("real", k, real[k], real_labels)
            width, other = synthetic[k].shape[1:].numel(), real[k].shape[1:].numel()
            if width != other:
                raise ValueError(
                    f"mim4dd.MutualInformation: map {k} has {width} features per image in synthetic_features "
                    f"and {other} in real_features; expected the same number"
                )
        return self._term(layers, synthetic, real, synthetic_labels, real_labels)

    def _term(
        self, layers: Sequence[int], synthetic: Sequence[Tensor], real: Sequence[Tensor], *labels: Tensor
    ) -> Tensor:
        """The term, of arguments that have been checked.

        Not in `forward`: what an error has passed through torch.compile runs untraced, and there it refuses
        comprehensions.
        """
        ours, theirs = ([self._embed(k, maps[k]) for k in layers] for maps in (synthetic, real))
        losses = self._losses(ours, theirs, *labels)
        decay = [self.weight * self.layer_decay ** (len(synthetic) - 1 - k) for k in layers]
        return sum((factor * loss for factor, loss in zip(decay, losses, strict=True)), losses.new_zeros(()))

    def _losses(
        self,
        synthetic: Sequence[Tensor],
        real: Sequence[Tensor],
        synthetic_labels: Tensor,
        real_labels: Tensor,
    ) -> Tensor:
        if self.loss == "info_nce":
            return info_nce_losses(
                real,
                synthetic,
                real_labels,
                synthetic_labels,
                temperature=self.temperature,
                positives="any",
                symmetric=self.symmetric,
            )
        labels = synthetic_labels, real_labels
        return nce_losses(
            synthetic,
            real,
            *labels,
            temperature=self.temperature,
            noise_ratio=self._critic_ratios(synthetic, real, *labels),
            negatives=self.negatives,
            symmetric=self.symmetric,
        )

    def _check_map(self, side: str, k: int, features: Tensor, labels: Tensor) -> None:
        """Floating [rows, ...] with a label a row, not empty, and as wide as its matrix is, if it has one."""
        check_tensor("MutualInformation", f"{side} map {k}", features, FEATURE_DTYPES)
        if features.ndim < 2:
            raise ValueError(
                f"mim4dd.MutualInformation: {side} map {k} is {list(features.shape)}, expected [rows, ...]; "
                "give it an axis of features"
            )
        check_tensor("MutualInformation", f"{side}_labels", labels, LABEL_DTYPES)
        if labels.shape != features.shape[:1]:
            raise ValueError(
                f"mim4dd.MutualInformation: {side}_labels is {list(labels.shape)}, and {side} map {k} "
                f"{list(features.shape)}; expected one label per row"
            )
        width = features.shape[1:].numel()
        # Two empty maps have cosines, all 0: the term would be a constant that nothing lowers.
        if not width:
            raise ValueError(
                f"mim4dd.MutualInformation: map {k} is empty: add {k} to Problem.layers, or remove it "
                "from the term's layers"
            )
        if self.projections and width != self.feature_sizes[k]:
            raise ValueError(
                f"mim4dd.MutualInformation: {side} map {k} has {width} features per image, expected "
                f"{self.feature_sizes[k]}, its feature size; give feature_sizes of these maps"
            )

    def _embed(self, k: int, features: Tensor) -> Tensor:
        features = features.flatten(1)
        return features @ self.projections[str(k)].to(features.dtype) if self.projections else features

    def _critic_ratios(
        self, synthetic: Sequence[Tensor], real: Sequence[Tensor], *labels: Tensor
    ) -> float | Tensor | Sequence[Tensor]:
        if not isinstance(self.noise_ratio, str):
            return self.noise_ratio
        if not self.noise_ratios.numel():
            measured = [
                calibrated_noise_ratio(*pair, *labels, temperature=self.temperature, negatives=self.negatives)
                for pair in zip(synthetic, real, strict=True)
            ]
            self.keep("noise_ratios", torch.stack(measured))
        if len(self.noise_ratios) != len(real):
            raise ValueError(
                f"mim4dd.MutualInformation: noise_ratios has {len(self.noise_ratios)} layers, but "
                f"{len(real)} are compared; expected the same number in every call"
            )
        return self.noise_ratios.unbind()


def layer_indices(layers: str | Sequence[int], num_layers: int) -> list[int]:
    """Return the indices, ascending, that "all", "last" or a list of possibly negative ones mean.

    Raises:
        ValueError: no such layer, or one index that is in no list.
    """
    given: Any = layers  # what is no list, one index too, is refused by name
    named = {"all": range(num_layers), "last": range(num_layers)[-1:]}
    if isinstance(layers, str) and layers in named:
        return list(named[layers])
    if isinstance(layers, str) or not isinstance(given, Iterable):
        raise ValueError(f"mim4dd: layers is {layers!r}, expected 'all', 'last' or a list of indices")
    wrong = [k for k in layers if k not in range(-num_layers, num_layers)]
    if wrong:
        raise ValueError(f"mim4dd: there is no layer {wrong[0]}, the network has {num_layers}")
    return sorted({k % num_layers for k in layers})
