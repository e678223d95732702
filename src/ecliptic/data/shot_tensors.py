"""Few-shot data that comes as tensors: one check of all that belongs together, before anything is learnt from it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ecliptic.data.shots import check_features, check_labels


def check_shots(
    features: Tensor,
    labels: Tensor,
    text: Tensor,
    *,
    views: Tensor | None = None,
    validation: tuple[Tensor, Tensor] | None = None,
    classes: Sequence[str] | None = None,
) -> tuple[str, ...]:
    """Class names ("0", "1" ... if none are given), once all fits together; else a ValueError that names what does not.

    features (N, D) and text (K, D), unit rows; labels (N,) int64, every class among them; views (V, N, D) of the same pictures;
    validation: features (B, D), unit rows, and labels (B,).
    """
    names = tuple(classes) if classes is not None else tuple(map(str, range(len(text))))
    check_features(features, text, len(names))
    check_labels(labels, len(features), names)
    if views is not None:
        if views.ndim != 3 or views.shape[1:] != features.shape or not len(views):
            raise ValueError(
                f"views must be (V, {', '.join(map(str, features.shape))}) with V > 0, got {tuple(views.shape)}"
            )
        check_unit_rows("views", views, views.shape)
    if validation is not None:
        held, truth = validation
        if held.ndim != 2 or held.shape[1] != features.shape[1]:
            raise ValueError(f"validation features must be (B, {features.shape[1]}), got {tuple(held.shape)}")
        check_features(held, text)
        check_labels(truth, len(held), names, every_class=False)
    return names


def check_unit_rows(name: str, rows: Tensor, shape: Sequence[int]) -> None:
    """ValueError unless `rows` has this shape, is finite, and every row has length 1."""
    if tuple(rows.shape) != tuple(shape):
        raise ValueError(f"{name} must be ({', '.join(map(str, shape))}), got {tuple(rows.shape)}")
    if not rows.isfinite().all():
        raise ValueError(f"{name} holds numbers that are not finite")
    if float((rows.norm(dim=-1) - 1).abs().max()) > 1e-2:
        raise ValueError(f"{name} must be unit rows: divide each by its norm")
