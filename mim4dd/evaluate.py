"""`python -m mim4dd.evaluate`: score a saved set by the evaluation protocol."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from . import extras  # noqa: F401 - before all that needs them
from .commands.config_check import COUNT_MAX, check_architectures
from .commands.config_json import from_json
from .commands.console import complain, on_architectures, print_table
from .commands.exits import guarded
from .commands.runner import score_facts
from .config import Config, EvalConfig
from .data import ImageSet, load
from .devices import pick_device
from .errors import InputError
from .evaluation import OnNetwork, Protocol, Score, evaluate
from .files import expanded, write
from .networks.precision import Precision, configure, resolve
from .synthetic import IMAGES, SyntheticSet


def score_saved(
    path: Path,
    /,
    *,
    eval_archs: tuple[str, ...] = (),
    dataset: str | None = None,
    data_dir: Path | None = None,
    num_eval: int = 5,
    eval_epochs: int | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: Precision = "auto",
    out: Path | None = None,
) -> None:
    """Train networks on a saved synthetic set and print their accuracy on the real test set.

    Args:
        path: a run's folder, or its synthetic.safetensors.
        eval_archs: some of convnet, convnet-bn, mlp, lenet, alexnet, vgg11, resnet18; default: the
            run's --network.
        dataset: name or path of the real data, if it is no longer where the run found it.
        data_dir: folder with the files of a named set.
        num_eval: networks trained per architecture.
        eval_epochs: epochs of each; default: the run's.
        seed: seed of weights, batches and augmentations.
        device: auto, cpu, cuda, cuda:1, ...
        precision: what the networks compute in; auto: the fastest for a ConvNet.
        out: a new JSON file for the accuracies.

    Raises:
        InputError: invalid options, no set of a run, or other data than it was made from.
    """
    path, out, data_dir = expanded(path), out and expanded(out), data_dir and expanded(data_dir)
    path = path / IMAGES if path.is_dir() else path
    wanted = EvalConfig(eval_archs=eval_archs).eval_archs
    _check(wanted, num_eval, eval_epochs, out)
    saved, config = _load_set(path)
    on = pick_device(device)
    picked = resolve(precision, on)
    configure(picked)
    test = _load_test(path, saved, config, dataset, data_dir).to(on)
    pair = saved.to(on).decoded, saved.to(on).targets
    epochs = eval_epochs or config.eval.eval_epochs
    settings = dataclasses.replace(
        config, precision=picked, eval=dataclasses.replace(config.eval, eval_epochs=epochs)
    )

    def score(architecture: str, on_network: OnNetwork) -> Score:
        protocol = Protocol.of(settings, architecture, saved.network_lr)
        return evaluate(
            lambda _: pair, test, protocol, num_networks=num_eval, seed=seed, on_network=on_network
        )

    if config.distill.soft_labels and saved.soft_labels is None:
        complain(f"{path} was interrupted before its soft labels were made; evaluated with plain labels")
    scores = on_architectures(wanted or (config.distill.network,), num_eval, score)
    print_table(
        f"Accuracy on the test set of {len(test)} images",
        ("network", "accuracy", "networks"),
        ((name, score, len(score.accuracies)) for name, score in scores.items()),
    )
    if out:
        _write(out, scores)


def _check(architectures: tuple[str, ...], num_eval: int, eval_epochs: int | None, out: Path | None) -> None:
    """Refuse invalid options, before any work starts.

    Raises:
        InputError: naming the option.
    """
    for option, value in (("--num-eval", num_eval), ("--eval-epochs", eval_epochs)):
        if value is not None and not 1 <= value < COUNT_MAX:
            raise InputError(f"{option} is {value}, expected at least 1 and below {COUNT_MAX}")
    if out and out.exists():
        raise InputError(f"--out {out} exists already; name a new file")
    if out and not out.absolute().parent.is_dir():
        raise InputError(f"--out {out}: there is no folder {out.parent}; make it, or name another")
    check_architectures(architectures)


def _load_set(path: Path) -> tuple[SyntheticSet, Config]:
    """Return the set and the settings of the run that made it.

    Raises:
        InputError: no readable set, or one without settings.
    """
    saved = SyntheticSet.load(path)
    if "config" not in saved.metadata:
        raise InputError(f"{path} holds no settings to evaluate with; expected the set of a mim4dd run")
    return saved, from_json(saved.metadata["config"], str(path))


def _load_test(
    path: Path, saved: SyntheticSet, config: Config, dataset: str | None, data_dir: Path | None
) -> ImageSet:
    """Return the real test images, normalised as the set is: that is what networks are trained on.

    Raises:
        InputError: the data cannot be found, or are not those that the set was made from.
    """
    source = dataset or config.data.dataset
    folder = data_dir or (None if dataset else config.data.data_dir)
    try:
        train, test = load(source, folder, config.data.image_size)
    except InputError as error:
        if dataset:
            raise
        raise InputError(
            f"{error}; if it moved, or the run was started in another folder, name it with --dataset"
        ) from error
    if not dataset and saved.metadata.get("data") not in (None, train.fingerprint):
        raise InputError(
            f"{source} has other images now than when {path} was made; name the run's data with --dataset"
        )
    if test.class_names != saved.class_names or test.images.shape[1:] != saved.images.shape[1:]:
        raise InputError(
            f"{path} holds {len(saved.class_names)} classes of images {list(saved.images.shape[1:])}, but "
            f"{source} {test.num_classes} of {list(test.images.shape[1:])}; "
            + ("give --dataset the data it was made from" if dataset else "name its data with --dataset")
        )
    test = test.whitened(saved.whitening) if saved.whitening else test
    return dataclasses.replace(test, mean=saved.mean, std=saved.std)


def _write(out: Path, scores: dict[str, Score]) -> None:
    try:
        write(out, json.dumps({name: score_facts(score) for name, score in scores.items()}, indent=2))
    except OSError as error:
        raise InputError(f"--out {out} cannot be written ({error.strerror})") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    import tyro  # not above, where it would come before `extras`

    return guarded(lambda: tyro.cli(score_saved, prog="python -m mim4dd.evaluate", args=arguments))


if __name__ == "__main__":
    sys.exit(main())
